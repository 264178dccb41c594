"""Policy and controller against an engine in miniature: bursts, tails, square waves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import pytest
from levels import W8_THEN_W4

from morphserve.config import MorphServeConfig
from morphserve.control import Controller, EngineView, Phase, largest_batch_bytes, make_ledgers
from morphserve.control.budget import RankBytes
from morphserve.control.ladder import build_ladder
from morphserve.control.monitor import Monitor
from policies import ThresholdConfig, ThresholdPolicy
from tests.fakes import FakeExecutor, FakePool

pytestmark = pytest.mark.cpu

SIZES = {"base": [1000] * 30, "w8": [500] * 30, "w4": [300] * 30}
STEP_S = 0.04
PROMPT_BLOCKS, MAX_BLOCKS, STEPS_PER_BLOCK = 3, 7, 16


@dataclass(slots=True)
class Request:
    index: int
    arrived_s: float
    wait_since_s: float
    blocks: int = 0
    steps: int = 0


class Engine:
    """Admits while blocks are free, grows requests, preempts the youngest: vLLM's way in short."""

    def __init__(self, mode: str = "default", max_num_seqs: int = 64, morph: bool = True) -> None:
        config = MorphServeConfig(policy=ThresholdConfig(kind="threshold", mode=mode))  # type: ignore[arg-type]
        ranks = [RankBytes(SIZES, 105)] * 2
        self.ladder = build_ladder(30, ranks, W8_THEN_W4, 49)
        ledgers = make_ledgers(self.ladder, ranks, [largest_batch_bytes(SIZES, 5)] * 2)
        self.pool = FakePool(49)
        self.executor = FakeExecutor(self.ladder, ranks, ledgers)
        self.monitor = Monitor()
        assert isinstance(config.policy, ThresholdConfig)
        policy = ThresholdPolicy(config.policy, self.ladder)
        self.now_s = 0.0
        self.controller = Controller(
            self.ladder, policy, self.pool, self.executor, self.monitor, config, ledgers,
            ranks=ranks, clock=lambda: self.now_s,
        )  # fmt: skip
        self.morph = morph
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.waits: list[float] = []
        self.levels: list[tuple[float, int]] = []
        self.num_preempted = 0
        self._count = 0

    def step(self, arrivals: int = 0) -> None:
        self.now_s += STEP_S
        for _ in range(arrivals):
            self.waiting.append(Request(self._count, self.now_s, self.now_s))
            self._count += 1
            self.monitor.on_arrival(self.now_s)
        if self.running or self.waiting:
            self.monitor.on_step(self.now_s, len(self.running))
        oldest = self.now_s - self.waiting[0].wait_since_s if self.waiting else 0.0
        if self.morph:
            self.controller.tick(EngineView(len(self.waiting), len(self.running), oldest))
        self._grow_running()
        self._admit()
        self.executor.forward(self.pool)
        self.levels.append((self.now_s, self.controller.effective_level))

    def _grow_running(self) -> None:
        for request in list(self.running):
            if request not in self.running:
                continue
            request.steps += 1
            if request.steps % STEPS_PER_BLOCK:
                continue
            if request.blocks == MAX_BLOCKS:
                self.running.remove(request)
                self.pool.finish(request.index)
                self.monitor.on_finish(request.blocks, self.now_s)
                continue
            while not self.pool.allocate(request.index, 1):
                victim = self.running.pop()
                self.pool.finish(victim.index)
                victim.blocks, victim.wait_since_s = 0, self.now_s
                self.waiting.appendleft(victim)
                self.num_preempted += 1
                self.monitor.on_preemption(self.now_s)
                if victim is request:
                    break
            else:
                request.blocks += 1

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            need = PROMPT_BLOCKS + request.steps // STEPS_PER_BLOCK
            if not self.pool.allocate(request.index, need):
                return
            self.waiting.popleft()
            if request.steps == 0:
                self.waits.append(self.now_s - request.arrived_s)
                self.monitor.on_scheduled(self.now_s, self.waits[-1])
            request.blocks = need
            self.running.append(request)

    def run(self, seconds: float, rate: float) -> None:
        for i in range(round(seconds / STEP_S)):
            self.step(int((i + 1) * STEP_S * rate) - int(i * STEP_S * rate))

    @property
    def num_entries(self) -> int:
        levels = [0] + [level for _, level in self.levels]
        return sum(after > 0 and before == 0 for before, after in zip(levels, levels[1:], strict=False))


@pytest.mark.parametrize("mode", ["default", "performance", "accuracy"])
def test_burst_is_absorbed_and_level_zero_is_reached_again(mode: str) -> None:
    """Guards: waits as long as without morphing, or a level kept for more than 10 s after the burst."""
    stock, morphing = Engine(morph=False), Engine(mode)
    for engine in (stock, morphing):
        engine.run(10, 2.0)
        engine.run(15, 8.0)
    assert max(stock.waits) > 2.0
    assert max(morphing.waits) < (0.5 if mode != "accuracy" else 1.5)
    assert morphing.num_preempted < stock.num_preempted / 4
    while morphing.waiting or morphing.running:
        morphing.step()
    emptied_s = morphing.now_s
    morphing.run(10, 0.0)
    assert morphing.controller.effective_level == 0
    back_s = min(t for t, level in morphing.levels if t >= emptied_s - 20 and level == 0 and t > 25)
    assert back_s - emptied_s < 10
    assert morphing.controller.phase is Phase.IDLE and morphing.pool.num_kv_blocks == 49


def test_light_load_after_a_burst_reaches_level_zero() -> None:
    """Guards: level 0 only ever reached by an empty server."""
    engine = Engine()
    engine.run(10, 8.0)
    engine.run(20, 1.0)
    assert engine.running and engine.controller.effective_level == 0


def test_square_wave_does_not_drag_the_level_along() -> None:
    """Guards: one round trip per period although the next burst is seconds away."""
    engine = Engine()
    for _ in range(12):
        engine.run(3, 8.0)
        engine.run(7, 0.0)
    assert engine.num_entries <= 8
    assert max(engine.waits) < 1.0


def test_light_load_never_morphs() -> None:
    """Guards: quality spent where stock would have done as well."""
    engine = Engine()
    engine.run(60, 1.2)
    assert engine.num_entries == 0 and max(engine.waits) < 0.1


def test_queue_because_of_max_num_seqs_never_morphs() -> None:
    """Guards: morphing where not KV but another limit keeps requests waiting."""
    engine = Engine(max_num_seqs=3)
    engine.run(30, 4.0)
    assert len(engine.waiting) > 20
    assert all(level == 0 for _, level in engine.levels)


def test_tail_of_a_burst_makes_no_entry() -> None:
    """Guards: degrading for requests that are about to end."""
    engine = Engine()
    engine.monitor.on_finish(5, 0.0)  # these will hold more, so their arrival alone raises no alarm
    for _ in range(6):
        engine.step(arrivals=1)
    for _ in range(300):
        engine.step()
    assert not engine.running and engine.num_entries == 0


def test_restore_turns_around_when_the_burst_comes_back() -> None:
    """Guards: a second burst served at the level of the lull."""
    engine = Engine()
    engine.run(10, 8.0)
    while engine.controller.target_level >= engine.controller.effective_level:
        engine.step()
    before = len(engine.waits)
    engine.run(8, 8.0)
    assert max(engine.waits[before:]) < 0.5
