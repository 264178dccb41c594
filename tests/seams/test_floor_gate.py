"""Requests that must not be served below a level of their own, on vLLM's real scheduler with a step under way."""

from __future__ import annotations

import gc
import logging
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from seams.async_world import VOCABULARY, World
from seams.test_async_scheduler import model as model

from morphserve.control import Health
from morphserve.integration.engine.requests import floors
from policies.floors import FloorPolicy

pytestmark = pytest.mark.seams


class FloorWorld(World):
    """Requests ask; the policy is held at their level for some of its seconds."""

    def __init__(self, model: Path, hold_s: float, **settings: Any) -> None:
        self.levels: dict[str, int] = {}
        super().__init__(
            model, 1, policy={"kind": "static", "level": 0, "floors": {"shallowest": 0, "hold_s": hold_s}}, **settings
        )
        self.morph.controller.replace_policy(FloorPolicy(self.policy, hold_s), "a test", self.morph.setup)

    def add_at(self, request_id: str, prompt: list[int], num_tokens: int, level: int) -> None:
        self.levels[request_id] = level
        self.add(request_id, prompt, num_tokens, morphserve_max_level=level)

    def check(self, output: Any) -> None:
        super().check(output)
        for name in output.num_scheduled_tokens:
            own = self.levels.get(name)
            assert own is None or self.morph.controller.effective_level <= own, name


PROMPT = [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("hold_s", [0.0, 1e9])
@pytest.mark.parametrize("seed", range(4))
def test_none_is_scheduled_below_its_level(model: Path, seed: int, hold_s: float) -> None:
    """Guards: the promise, when the level wanders, steps are under way, requests are aborted; a request lost."""
    world, random_ = FloorWorld(model, hold_s, kv={"max_preemptions": 4, "drain_timeout_s": 1e6}), random.Random(seed)
    deepest = len(world.morph.runtime.ladder) - 1
    held = 0
    for step in range(250):
        if random_.random() < 0.25:
            prompt = [random_.randrange(VOCABULARY) for _ in range(random_.randrange(1, 16))]
            if random_.random() < 0.4:
                world.add_at(f"r{step}", prompt, random_.randrange(1, 30), random_.randrange(deepest))
            else:
                world.add(f"r{step}", prompt, random_.randrange(1, 30))
        if random_.random() < 0.03 and (names := [name for name in world.expected if name in world.scheduler.requests]):
            world.abort(random_.choice(names))
        if random_.random() < 0.08:
            world.policy.level = random_.choice((0, 0, 1, deepest, random_.randrange(deepest + 1)))
        world.step()
        held = max(held, world.morph.gate.num_held)
    assert held > 0 or hold_s
    world.policy.level = 0
    for _ in range(500):
        world.step()
        if not world.scheduler.requests:
            break
    world.run_dry()
    assert not world.morph.gate._levels and not world.morph.gate.num_held and not world.morph.monitor._max_levels


def test_held_requests_are_no_load(model: Path) -> None:
    """Guards: who waits for a level taken for a queue that a deeper level would help, or for no work at all."""
    world = FloorWorld(model, 0.0)
    world.policy.level = 1
    for _ in range(20):
        world.step()
    world.add_at("a", PROMPT, 4, 0)
    world.step()
    view = world.morph.traffic.view()
    assert (view.num_waiting, view.oldest_wait_s, world.morph.gate.num_held) == (0, 0.0, 1)
    assert not world.morph.monitor._waiting.cohorts() and world.morph.status()["num_held"] == 1
    assert world.scheduler.has_requests(), "in-process nothing else makes the steps that end its wait"
    world.policy.level = 0
    for _ in range(20):
        world.step()
    assert world.tokens["a"] == world.expected["a"]
    told = world.morph.status()
    assert (told["num_held"], told["num_held_total"]) == (0, 1)


@pytest.mark.parametrize("when", ["before", "waiting", "running"])
def test_who_is_held_arrives_once(model: Path, when: str) -> None:
    """Guards: a forecast of twice the load, as each request that is let in counts as one more; of less, as it counts as
    none. `when`: the level becomes too deep before it comes, while it waits, or while it runs."""
    world = FloorWorld(model, 0.0, kv={"max_preemptions": 4, "drain_timeout_s": 1e6})
    world.add("other", PROMPT, 50)  # alone it would be served at once
    world.policy.level = int(when == "before")
    for _ in range(20 if when == "before" else 0):
        world.step()
    world.add_at("a", PROMPT, 30, 0)
    for _ in range(3 if when == "running" else 0):
        world.step()
    world.policy.level = 1
    for _ in range(10):
        world.step()
    monitor = world.morph.monitor
    assert world.morph.gate.num_held == 1 and monitor._num_arrivals == 1 + (when != "before")
    world.policy.level = 0
    world.run_dry()
    assert world.tokens["a"] == world.expected["a"] and not len(monitor._waiting) and not monitor._held
    assert monitor._num_arrivals == 2


def test_a_session_asks_for_its_turns(model: Path) -> None:
    """Guards: a session that asks and is served below its level; one that holds the level between two turns, in which
    nobody waits for a token; a turn that was sent while the one before it ran, held in vLLM's queue or lost from it."""
    world = FloorWorld(model, 0.0, kv={"max_preemptions": 4, "drain_timeout_s": 1e6})
    gate, monitor = world.morph.gate, world.morph.monitor
    ends: list[Any] = []

    def run(until: int) -> None:
        for _ in range(200):
            world.step()
            ends[:] = [one for one in world.outputs if one.finish_reason is not None]
            if len(ends) >= until:
                return
        raise AssertionError("the turn did not end")

    world.levels["s"] = 0
    world.add("s", PROMPT, 4, session=True, morphserve_max_level=0)
    assert monitor._max_levels == {0: 1}
    world.add("s", [7, 8], 4, session=True, morphserve_max_level=0)  # waits for the turn before it
    run(2)
    assert not gate._levels and not monitor._max_levels, "between two turns"
    world.policy.level = 1
    world.add("other", PROMPT, 50)  # alone the session would be served at once
    for _ in range(20):
        world.step()
    assert world.morph.controller.level == 1
    world.add("s", [9], 4, session=True, morphserve_max_level=0)
    world.step()
    assert gate.num_held == 1 and monitor._max_levels == {0: 1}
    view = world.morph.traffic.view()
    assert (view.num_waiting, view.num_running) == (0, 1), "it waits for a level, with its KV"
    world.policy.level = 0
    run(4)
    assert gate.num_held == 0 and not monitor._max_levels
    world.add("another", PROMPT, 50)
    world.add("s", [3], 30, session=True, morphserve_max_level=0)
    for _ in range(4):
        world.step()
    world.policy.level = 1  # in the middle of its turn
    for _ in range(20):
        world.step()
    assert gate.num_held == 1 and world.morph.controller.level == 1
    world.end_session("s")
    world.policy.level = 0
    for _ in range(100):
        world.step()
    assert not world.scheduler.requests and not gate._levels and not gate._leaving
    assert [len(tokens) for tokens in world.tokens.values()] == [4 + 4 + 4 + 30, 50, 50]


def test_a_held_turn_of_who_goes_is_forgotten(model: Path) -> None:
    """Guards: a client that goes while its turn waits for a level, before or after it has left vLLM's queue."""
    world = FloorWorld(model, 0.0)
    world.policy.level = 1
    world.add("other", PROMPT, 50)
    for _ in range(20):
        world.step()
    for number in range(4):
        world.add_at(f"r{number}", PROMPT, 4, 0)
        if number % 2:
            world.step()
    for number in (0, 1, 3):
        world.abort(f"r{number}")
    gate = world.morph.gate
    assert list(gate._held) == ["r2"] and gate._leaving <= {world.scheduler.requests["r2"]}
    world.policy.level = 0
    world.run_dry()
    assert not world.scheduler.requests and not gate._levels


def test_what_a_step_costs_does_not_depend_on_how_many_wait(model: Path) -> None:
    """Guards: a pause of everybody at a client's choice: a walk over thousands of held requests at each step, or over
    the queue for each of them."""

    class Counting:
        """vLLM's queue, which counts how often somebody has walked over it."""

        def __init__(self, queue: Any) -> None:
            self.queue, self.walks = queue, 0

        def remove_requests(self, requests: Any) -> None:
            self.walks += 1
            self.queue.remove_requests(requests)

        def __getattr__(self, name: str) -> Any:
            if name in ("remove_request", "remove", "index", "count"):
                self.walks += 1
            return getattr(self.queue, name)

        def __len__(self) -> int:
            return len(self.queue)

    calls = []
    for number in (3, 300):
        world = FloorWorld(model, 0.0)
        world.policy.level = 1
        for _ in range(20):
            world.step()
        queue = world.scheduler.waiting = Counting(world.scheduler.waiting)
        for index in range(number):
            world.add_at(f"r{index}", PROMPT, 4, 0)
        gate, morph = world.morph.gate, world.morph
        gate.take_out()
        assert queue.walks == 1 and gate.num_held == number and not len(queue)
        calls.append(calls_of(lambda gate=gate: (gate.take_out(), gate.enforce(1))))
        calls.append(calls_of(lambda morph=morph: morph.traffic.view()))
        assert queue.walks == 1
        world.scheduler.waiting = queue.queue
    assert calls[:2] == calls[2:]


def calls_of(do: Any) -> int:
    """How many functions are called, ours and others', but for those that a collection of garbage calls."""
    seen = []
    gc.collect()
    gc.disable()
    sys.setprofile(lambda frame, event, arg: seen.append(event) if event in ("call", "c_call") else None)
    try:
        do()
    finally:
        sys.setprofile(None)
        gc.enable()
    return len(seen)


def test_nobody_waits_for_a_level_that_nobody_decides_on(model: Path) -> None:
    """Guards: requests that wait for ever after an error has ended morphing."""
    world = FloorWorld(model, 0.0)
    world.policy.level = 1
    for _ in range(20):
        world.step()
    world.add_at("a", PROMPT, 4, 0)
    assert world.morph.gate.num_held == 1
    world.morph.health = Health.RESTING
    world.morph.before_schedule()
    assert world.morph.gate.num_held == 0 and len(world.scheduler.waiting) == 1


def test_who_may_not_ask_is_served_as_all_are(model: Path) -> None:
    """Guards: a level held up without the operator's leave, or a request lost over what is no level."""
    world = FloorWorld(model, 1e9)
    world.morph.gate.floors = type(world.morph.gate.floors)(world.morph.runtime.ladder, None, {}, {})
    world.policy.level = 2
    marks = {"morphserve_key": ["no key"], "morphserve_model": {"no": "model"}}  # an API server writes none of these
    for number, asked in enumerate((0, "8bit", "none", [1])):
        world.add(str(number), PROMPT, 3, morphserve_max_level=asked, **marks)
    world.add("key", PROMPT, 3, morphserve_max_level=0, morphserve_key=[1])
    for _ in range(20):
        world.step()
    assert world.morph.controller.level == 2
    world.run_dry()


def test_what_is_no_level_is_one_warning(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a client that fills the log with what it asks for."""
    lines: list[str] = []
    monkeypatch.setattr(floors.logger, "log", lambda level, text, *args: lines.append(logging.getLevelName(level)))
    world = FloorWorld(model, 1e9)
    for number in range(5):
        world.add(str(number), PROMPT, 3, morphserve_max_level="none")
    assert lines[0] == "WARNING" and set(lines[1:]) == {"DEBUG"}


def test_who_may_run_at_the_level_is_not_sent_back(model: Path) -> None:
    """Guards: requests that wait, though the level that the load asks for is the one that they allow."""
    world = FloorWorld(model, 0.0)
    world.add_at("a", PROMPT, 50, 1)
    world.add("other", PROMPT, 50)
    world.policy.level = 1
    for _ in range(30):
        world.step()
        assert world.morph.gate.num_held == 0
    assert world.morph.controller.level == 1
    world.run_dry()


@pytest.mark.parametrize(("name", "level"), [("tuned", 1), ("other", None)])
def test_an_adapter_is_what_its_client_calls_the_model(model: Path, name: str, level: int | None) -> None:
    """Guards: the operator's level of an adapter taken for that of the model under it."""
    gate = FloorWorld(model, 0.0).morph.gate
    gate.floors = replace(gate.floors, shallowest=None, by_model={"tuned": 1, "base": 0})
    params = SimpleNamespace(extra_args={"morphserve_max_level": 0, "morphserve_model": "base"})
    asked: Any = SimpleNamespace(sampling_params=params, lora_request=SimpleNamespace(lora_name=name), request_id="r")
    assert gate._level_of(asked) == level
    asked.lora_request = None
    assert gate._level_of(asked) == 0


def held_at_level_1(model: Path, **settings: Any) -> FloorWorld:
    """Two requests that wait for level 0, and nothing else to do."""
    world = FloorWorld(model, 0.0, **settings)
    world.policy.level = 1
    for _ in range(20):
        world.step()
    for name in ("a", "b"):
        world.add_at(name, PROMPT, 4, 0)
    world.morph.gate.take_out()  # which the step does that vLLM makes for them
    return world


@pytest.mark.parametrize("shallowest", [None, 1])
def test_who_may_not_ask_any_more_is_let_go(model: Path, shallowest: int | None) -> None:
    """Guards: requests that wait for a level which a reload has forbidden, while the policy knows of none."""
    world = held_at_level_1(model)
    world.levels.clear()
    world.morph.gate.floors = type(world.morph.gate.floors)(world.morph.runtime.ladder, shallowest, {}, {})
    world.step()
    assert world.morph.gate.num_held == 0
    assert world.morph.monitor._max_levels == ({} if shallowest is None else {shallowest: 2})
    world.run_dry()
    assert world.morph.controller.level == 1 and not world.morph.monitor._max_levels


def test_an_error_while_they_are_let_in_loses_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: requests that are in no queue any more, whose clients wait for ever, after an error of ours."""
    world = held_at_level_1(model)
    monkeypatch.setattr(world.morph.monitor, "on_let_in", lambda now, request: 1 // 0)
    world.morph.health = Health.RESTING
    for _ in range(3):
        world.morph.before_schedule()
    assert world.morph.gate.num_held == 0 and [r.request_id for r in world.scheduler.waiting] == ["a", "b"]


def test_a_queue_that_does_not_take_them_loses_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: requests that have left the one queue, and that an error has kept from the other."""
    world = held_at_level_1(model)
    queue, refusals = type(world.scheduler.waiting), [True, False, True]  # of the first call, and of the third

    def refusing(take: Any) -> Any:
        def prepend(self: Any, what: Any) -> None:
            if refusals and refusals.pop(0):
                raise MemoryError
            take(self, what)

        return prepend

    for name in ("prepend_request", "prepend_requests"):
        monkeypatch.setattr(queue, name, refusing(getattr(queue, name)))
    world.morph.health = Health.RESTING
    for _ in range(3):
        world.morph.before_schedule()
        waiting = [r.request_id for r in world.scheduler.waiting]
        assert sorted([*waiting, *world.morph.gate._held]) == ["a", "b"], "in one of them, and in one only"
    assert waiting == ["a", "b"] and not refusals


def test_one_that_has_ended_is_not_let_in(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a request that its client has left, and whose end an error of ours kept from the gate, is scheduled."""
    world = held_at_level_1(model)
    monkeypatch.setattr(world.morph.traffic, "on_finish", lambda request: 1 // 0)
    world.abort("a")
    world.morph.before_schedule()
    assert world.morph.health is Health.RESTING and [r.request_id for r in world.scheduler.waiting] == ["b"]


@pytest.mark.parametrize("is_running", [True, False])
def test_an_engine_that_is_to_end_serves_them_first(
    model: Path, monkeypatch: pytest.MonkeyPatch, is_running: bool
) -> None:
    """Guards: `--shutdown-timeout`, which gives requests time to end: those that wait for their level are cut off when
    the others are done; or an engine that never sleeps while they wait."""
    world = held_at_level_1(model)
    monkeypatch.setattr(world.morph, "_idle_ticker", object())
    monkeypatch.setattr(world.morph.runtime.engine_core, "is_running", lambda: is_running, raising=False)
    world.morph.wake_due = False
    assert world.scheduler.has_requests() is not is_running


def test_who_waits_wakes_the_engine_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a request that waits for a level whose restore keeps failing, and keeps a core busy as long as it waits;
    or one that nobody tells the policy of."""
    world = held_at_level_1(model, transition={"max_layers_per_step": 2, "max_pause_ms": 1e6, "backoff_s": 600.0})
    (rank,) = world.ranks.ranks
    obey = rank.obey

    def refuses(method: str, plan: Any) -> Any:
        reply = obey(method, replace(plan, layer_formats=()))
        return replace(reply, ok=False, error="damaged") if plan.layer_formats else reply

    monkeypatch.setattr(rank, "obey", refuses)
    assert world.morph._claims_step(), "the policy must hear of it"
    for _ in range(20):
        world.step()
    assert world.morph.controller.counters.transitions[("restore", "aborted")] == 1
    assert world.morph.gate.num_held == 2 and not world.morph._claims_step()
