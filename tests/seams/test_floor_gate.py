"""Requests that must not be served below a level of their own, on vLLM's real scheduler with a step under way."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from seams.async_world import VOCABULARY, World
from seams.test_async_scheduler import model as model

from morphserve.control import Health
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
    for number, asked in enumerate((0, "8bit", "none", [1])):
        world.add(str(number), PROMPT, 3, morphserve_max_level=asked)
    world.add("key", PROMPT, 3, morphserve_max_level=0, morphserve_key=[1])
    for _ in range(20):
        world.step()
    assert world.morph.controller.level == 2
    world.run_dry()


def held_at_level_1(model: Path, **settings: Any) -> FloorWorld:
    """Two requests that wait for level 0, and nothing else to do."""
    world = FloorWorld(model, 0.0, **settings)
    world.policy.level = 1
    for _ in range(20):
        world.step()
    for name in ("a", "b"):
        world.add_at(name, PROMPT, 4, 0)
    return world


def test_an_error_while_they_are_let_in_loses_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: requests that are in no queue any more, whose clients wait for ever, after an error of ours."""
    world = held_at_level_1(model)
    monkeypatch.setattr(world.morph.monitor, "on_let_in", lambda request_id: 1 // 0)
    world.morph.health = Health.RESTING
    for _ in range(3):
        world.morph.before_schedule()
    assert world.morph.gate.num_held == 0 and [r.request_id for r in world.scheduler.waiting] == ["a", "b"]


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
