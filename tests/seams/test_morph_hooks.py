"""What the scheduler calls may fail inside, and vLLM never hears of it."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from morphserve.control import Health
from morphserve.errors import EngineLostError
from morphserve.integration.engine.block_pool import VllmBlockPool
from morphserve.integration.engine.hooks import Morph
from morphserve.integration.engine.requests.traffic import StepInFlight, Traffic


class Broken:
    """Fails at whatever it is asked."""

    def __getattr__(self, name: str) -> Any:
        raise OSError(f"planted: {name}")


class CountingController:
    """As far as the hooks know it."""

    effective_level = level_ahead = 0
    in_transition = wants_wakeup = False
    lost = ""

    def __init__(self) -> None:
        self.num_ticks = 0
        self.failed: list[tuple[str, Any]] = []

    def tick(self, view: Any) -> None:
        self.num_ticks += 1

    def look_back(self) -> None:
        pass

    def fail(self, where: str) -> None:
        self.failed.append((where, sys.exc_info()[1]))


def make_morph(**parts: Any) -> Any:
    """A `Morph` around these parts; what is not given fails at the first touch."""
    morph = object.__new__(Morph)
    rest = ("_scheduler", "monitor", "receipts", "executor")
    morph.__dict__ |= dict.fromkeys(rest, Broken())
    morph.__dict__ |= {
        "health": Health.RUNNING,
        "wake_due": False,
        "tokens_by_level": [0],
        "controller": CountingController(),
        "provenance": SimpleNamespace(forget=lambda request_id: None, set_level=lambda level: None, sweep=lambda: None),
        "tick_times": SimpleNamespace(add=lambda seconds: None),
        "_in_flight": {},
        "pool": SimpleNamespace(num_used_blocks=0, is_discarding=False),
        "gate": SimpleNamespace(
            on_arrival=lambda request: False, on_finish=str, take_out=lambda: None, enforce=str, open=lambda: None,
            num_held=0,
        ),
        "_heap_used": False,
        "_between_turns": set(),
        **parts,
    }
    morph.traffic = Traffic(morph._scheduler, morph.monitor)
    return morph


OUTPUT = SimpleNamespace(
    num_scheduled_tokens={},
    total_num_scheduled_tokens=1,
    scheduled_new_reqs=[],
    scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
)
MODEL_OUTPUT = SimpleNamespace(sampled_token_ids=[[1]])
REQUEST = SimpleNamespace(
    request_id="asked", arrival_time=0.0, num_tokens=3, num_computed_tokens=0, num_output_tokens=1, priority=0
)
HOOKS: dict[str, tuple[Any, ...]] = {
    "before_schedule": (),
    "after_schedule": (OUTPUT,),
    "before_update": (OUTPUT,),
    "after_update": (OUTPUT, MODEL_OUTPUT, {0: SimpleNamespace(outputs=[])}),
    "on_arrival": (REQUEST,),
    "before_preemption": (REQUEST,),
    "on_preemption": (REQUEST,),
    "on_finish": (REQUEST,),
    "on_turn_end": (REQUEST,),
    "on_turn": (REQUEST,),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_an_exception_in_a_hook_fails_and_stays_inside(hook: str) -> None:
    """Guards: an exception of ours ends vLLM's engine loop, is lost in silence, or is met again at every step."""
    morph = make_morph(_in_flight={id(OUTPUT): StepInFlight(0)})
    for _ in range(3):
        getattr(morph, hook)(*HOOKS[hook])
    assert morph.health is Health.RESTING
    ((where, error),) = morph.controller.failed
    assert where == "hooks" and isinstance(error, OSError) and "planted" in str(error)


def test_a_failed_controller_is_ticked_on() -> None:
    """Guards: a transition under way is left half done, with its blocks fenced, after the hooks has failed."""
    morph = make_morph()
    morph.on_arrival(REQUEST)
    assert morph.health is Health.RESTING and morph.controller.num_ticks == 0
    for _ in range(2):
        morph.before_schedule()
    assert morph.controller.num_ticks == 2 and len(morph.controller.failed) == 1


def test_what_has_failed_looks_at_nothing_more() -> None:
    """Guards: a hook that goes on half-fed after another has failed, and fails at every request."""
    seen: list[str] = []
    monitor = SimpleNamespace(on_preemption=lambda *args, **kwargs: seen.append("preemption"))
    morph = make_morph(monitor=monitor, _scheduler=SimpleNamespace(policy=None))
    morph.on_preemption(REQUEST)
    assert seen == ["preemption"] and morph.health is Health.RUNNING
    morph.on_finish(REQUEST)
    morph.on_preemption(REQUEST)
    assert seen == ["preemption"] and morph.health is Health.RESTING


@pytest.mark.parametrize("is_discarding", [True, False])
def test_what_is_computed_again_is_no_lack_of_memory(is_discarding: bool) -> None:
    """Guards: KV that was thrown away counts as preemptions for want of memory, and the policy goes deeper."""
    seen: list[Any] = []
    monitor = SimpleNamespace(on_preemption=lambda now, request, forced: seen.append(forced))
    pool = SimpleNamespace(is_discarding=is_discarding)
    make_morph(monitor=monitor, _scheduler=SimpleNamespace(policy=None), pool=pool).on_preemption(REQUEST)
    assert seen == [is_discarding]


@pytest.mark.parametrize("works", [True, False])
def test_what_vllm_preempts_to_compute_it_again_is_told_apart(works: bool) -> None:
    """Guards: the same, where nobody says that KV is thrown away now, or where it is said for good; and a cache that
    vLLM could not empty taken for an empty one."""
    pool, seen = object.__new__(VllmBlockPool), []

    def reset(reset_running_requests: bool) -> bool:
        seen.append((pool.is_discarding, reset_running_requests))
        return works

    pool._scheduler = SimpleNamespace(reset_prefix_cache=reset, requests={})
    with nullcontext() if works else pytest.raises(RuntimeError, match="has not reset"):
        pool.discard_contents()
    assert seen == [(True, True)] and not pool.is_discarding


def test_an_engine_whose_ranks_differ_ends() -> None:
    """Guards: what ranks that differ have made is read, or scheduled on."""
    morph = make_morph()
    morph.controller.lost = "COMMITTING at level 0: rank 1: planted"
    for call in (morph.before_schedule, lambda: morph.before_update(OUTPUT)):
        with pytest.raises(EngineLostError, match="rank 1: planted. Ranks may hold .* Start it again"):
            call()


def test_ranks_are_looked_at_before_a_step_is_read() -> None:
    """Guards: clients get the tokens of a step for which a rank had failed to do what cannot fail."""
    morph = make_morph(_in_flight={id(OUTPUT): StepInFlight(0)})
    morph.controller.look_back = lambda: setattr(morph.controller, "lost", "rank 1: planted")
    with pytest.raises(EngineLostError, match="rank 1: planted"):
        morph.before_update(OUTPUT)


def test_what_ends_the_process_is_let_through() -> None:
    """Guards: Ctrl-C during a hook is swallowed."""

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    morph = make_morph(monitor=SimpleNamespace(on_preemption=interrupt), _scheduler=SimpleNamespace(policy=None))
    with pytest.raises(KeyboardInterrupt):
        morph.on_preemption(REQUEST)
    assert morph.health is Health.RUNNING
