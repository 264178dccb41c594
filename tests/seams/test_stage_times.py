"""What is learned of step times where pipeline stages have several steps under way."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from seams.test_morph_hooks import CountingController, make_morph
from vllm.v1.core.sched.scheduler import Scheduler

from morphserve.control import EngineView, Monitor
from morphserve.integration.engine import hooks
from morphserve.integration.engine.requests import traffic
from policies import StepLoad

STAGE_S = 0.05  # of any batch
QUEUE = 2  # steps that may be under way, vLLM's figure for two stages


class _Scheduler(Scheduler):
    """What `Traffic` reads of vLLM's; a batch has all groups of requests that are in no other one."""

    def __init__(self) -> None:
        self.block_size, self.requests = 4, {}
        self.free: list[str] = []


class Stages:
    """vLLM's `EngineCore.step_with_batch_queue` (vllm/v1/engine/core.py) over two stages that take `STAGE_S` each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.queue: deque[tuple[Any, float]] = deque()
        self.learned: list[StepLoad | None] = []  # after each step with tokens
        self._stage_free_s = [0.0, 0.0]
        monkeypatch.setattr(traffic.time, "monotonic", lambda: self.now_s)
        self.scheduler, self.monitor = _Scheduler(), Monitor()
        receipts = SimpleNamespace(
            on_scheduled=lambda *_: None, before_outputs=lambda _: None, attach=lambda _: None
        )
        self.morph = make_morph(
            _scheduler=self.scheduler, monitor=self.monitor, receipts=receipts, controller=self._controller()
        )

    def _controller(self) -> Any:
        controller = CountingController()
        controller.tick = lambda view: self.monitor.snapshot(self.now_s, view, 10, 3, 0, 0)  # type: ignore[method-assign]
        return controller

    def step(self, prompt: int = 0) -> None:
        """Make one call of the engine core; what is free goes into a batch, with so many tokens of a prompt."""
        scheduler = self.scheduler
        self.morph.traffic.view = lambda: EngineView(0, 1, 0.0)
        self.morph.before_schedule()
        groups, scheduler.free = scheduler.free, []
        output = SimpleNamespace(
            groups=groups, num_scheduled_tokens=dict.fromkeys(groups, 1),
            total_num_scheduled_tokens=len(groups) + (prompt if groups else 0), scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        )  # fmt: skip
        self.morph.after_schedule(output)
        self.queue.append((output, self._end_s() if groups else 0.0))
        if len(self.queue) < QUEUE:
            return
        output, end_s = self.queue.popleft()
        self.now_s = max(self.now_s, end_s)
        self.morph.before_update(output)
        self.morph.after_update(output, SimpleNamespace(sampled_token_ids=[[1] for _ in output.groups]), {})
        scheduler.free += output.groups
        if output.groups:
            self.learned.append(self.monitor.last_step)
        assert self.morph.health is hooks.Health.RUNNING

    def _end_s(self) -> float:
        end_s = self.now_s
        for stage, free_s in enumerate(self._stage_free_s):
            end_s = self._stage_free_s[stage] = max(end_s, free_s) + STAGE_S
        return end_s


def seconds(learned: list[StepLoad | None]) -> list[float | None]:
    return [step if step is None else round(step.seconds, 6) for step in learned]


def test_one_batch_is_timed_though_empty_steps_fill_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the empty step between two of the only batch taken for idleness: no server with stages learns a time."""
    stages = Stages(monkeypatch)
    stages.scheduler.free = ["a"]
    for _ in range(8):
        stages.step()
    assert seconds(stages.learned) == [None, *[2 * STAGE_S] * 3]
    assert stages.monitor.snapshot(stages.now_s, EngineView(0, 1, 0.0), 10, 3, 0, 0).tpot_s == pytest.approx(0.1)


def test_a_step_beside_another_takes_what_its_requests_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the time between results of two batches, half of what a token takes, learned as a step's time."""
    stages = Stages(monkeypatch)
    stages.scheduler.free = ["a"]
    stages.step()
    stages.scheduler.free = ["b"]
    for _ in range(8):
        stages.step()
    assert seconds(stages.learned[2:]) == [2 * STAGE_S] * 6
    assert stages.learned[:2] == [None, None]  # nothing ended before these were sent
    assert stages.monitor.snapshot(stages.now_s, EngineView(0, 2, 0.0), 10, 3, 0, 0).tpot_s == pytest.approx(0.1)


def test_a_step_behind_a_prompt_is_not_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the time that another batch's prompt took learned as that of a step without one."""
    stages = Stages(monkeypatch)
    stages.scheduler.free = ["a"]
    stages.step()
    stages.scheduler.free = ["b"]
    for prompt in (0, 0, 300, 0, 0, 0, 0):
        stages.step(prompt)
    tokens = [step if step is None else step.prefill_tokens for step in stages.learned[2:]]
    assert tokens.count(300) == 1 and tokens.count(None) == 1
    assert tokens.index(None) == tokens.index(300) + 1


def test_idleness_is_no_step_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: seconds without work learned as those of a slow step, now that an empty step need not mean idleness."""
    stages = Stages(monkeypatch)
    stages.scheduler.free = ["a"]
    for _ in range(4):
        stages.step()
    stages.scheduler.free = []
    for _ in range(2):
        stages.step()
    stages.now_s += 5.0
    del stages.learned[:]
    stages.scheduler.free = ["b"]
    for _ in range(5):
        stages.step()
    assert seconds(stages.learned) == [None, 2 * STAGE_S]
