"""What is kept of a request while it lives: nothing of it stays, however it ends and whatever meets it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from seams.async_world import VOCABULARY, World
from seams.test_async_scheduler import model as model
from seams.test_floor_gate import FloorWorld
from vllm.v1.request import RequestStatus

from morphserve.integration.engine.requests.receipts import PRECISION_ARG, RECEIPT_ARG

pytestmark = pytest.mark.seams

ASKS: tuple[dict[str, Any], ...] = (
    {},
    {RECEIPT_ARG: "tokens"},
    {PRECISION_ARG: "full"},
    {"morphserve_tpot_s": 0.2, "morphserve_ttft_s": 3.0, RECEIPT_ARG: 1},
    {"morphserve_max_level": 1, RECEIPT_ARG: 1},
    {"morphserve_max_level": 0},
)


def kept(world: World) -> dict[str, int]:
    """Return how many entries each of our books has, of those that have any."""
    morph, monitor = world.morph, world.morph.monitor
    books: dict[str, Any] = {
        "in flight": morph._in_flight,
        "between turns": morph._between_turns,
        "drafts": morph.receipts._drafts,
        "begun": morph.receipts._begun,
        "sealed": morph.receipts._sealed,
        "spans": morph.provenance._spans,
        "found": morph.provenance._found,
        "reused": morph.provenance._reused,
        "demanding": morph.provenance._demanding,
        "awaiting": morph.traffic._awaiting_first_token,
        "first tokens": morph.traffic.late._first_token_s,
        "waiting": monitor._waiting._members,
        "cohorts": monitor._waiting._groups,
        "limits": monitor._running._limits,
        "floors": monitor._max_levels,
        "held": monitor._held,
        "gate": morph.gate._levels,
        "held at the gate": morph.gate._held,
    }
    return {name: len(book) for name, book in books.items() if book}


class Crowd:
    """Requests of all kinds, and sessions, which come, go on and go away as chance has it."""

    def __init__(self, world: FloorWorld, seed: int, has_sessions: bool) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.has_sessions = has_sessions
        self.sessions: set[str] = set()
        self.common = self._prompt(10)

    def _prompt(self, length: int) -> list[int]:
        return [self.random.randrange(VOCABULARY) for _ in range(length)]

    def step(self, number: int) -> None:
        chance, world = self.random.random, self.world
        if chance() < 0.25:
            self._arrive(f"r{number}")
        if self.has_sessions and chance() < 0.15:
            self._turn(f"s{number}")
        if chance() < 0.06 and world.scheduler.requests:
            name = self.random.choice(sorted(world.scheduler.requests))
            world.expected.pop(name, None)
            self.sessions.discard(name)
            world.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        if chance() < 0.1:
            world.policy.level = self.random.choice((0, 0, 1, 3, len(world.morph.runtime.ladder) - 1))
        world.step()

    def _arrive(self, name: str) -> None:
        asks = self.random.choice(ASKS)
        if "morphserve_max_level" in asks:
            self.world.levels[name] = asks["morphserve_max_level"]
        prompt = self.common[: self.random.randrange(11)] + self._prompt(4)
        self.world.add(name, prompt, self.random.randrange(1, 30), **asks)

    def _turn(self, new: str) -> None:
        """Begin a session, or go on with one, or end it."""
        live = sorted(name for name in self.sessions if name in self.world.scheduler.requests)
        name = self.random.choice([*live, new])
        if name != new and self.random.random() < 0.4:
            self.sessions.discard(name)
            self.world.end_session(name)
            return
        if name != new and self._is_busy(self.world.scheduler.requests[name]):
            return
        self.sessions.add(name)
        self.world.add(name, self._prompt(3), 3, session=True, **self.random.choice(ASKS[:4]))
        del self.world.expected[name]  # of several turns

    @staticmethod
    def _is_busy(session: Any) -> bool:
        """Return whether it is as long as may be, or has a turn that waits."""
        return bool(session.num_tokens > 40 or session.streaming_queue)

    def leave(self) -> None:
        """Let all that is here come to its end, at level 0."""
        world = self.world
        world.policy.level = 0
        for name in self.sessions:
            if name in world.scheduler.requests:
                world.end_session(name)
        for _ in range(900):
            if not world.scheduler.requests:
                break
            world.step()
        assert not world.scheduler.requests
        world.run_dry()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("meets", ["sessions", "faults"])
def test_nothing_is_kept_of_requests_that_have_ended(model: Path, seed: int, meets: str) -> None:
    """Guards: a book that grows with uptime, by what was aborted while it waited for its level, preempted, computed
    again after a fault, or left between two turns."""
    transition = {"max_layers_per_step": 2, "max_pause_ms": 1e6, "backoff_s": 1e-6, "backoff_max_s": 1e-6}
    kv = {"max_preemptions": 4, "migrate_blocks_per_step": 3, "drain_timeout_s": 1e6}
    world = FloorWorld(model, 1e9 if seed else 0.0, kv=kv, transition=transition)
    crowd = Crowd(world, seed, meets == "sessions")
    seen: set[str] = set()
    for number in range(300):
        if meets == "faults" and number % 40 == 0:
            world.ranks.ranks[0].num_faults = 1
        crowd.step(number)
        seen |= kept(world).keys()
    world.ranks.ranks[0].num_faults = 0
    crowd.leave()
    assert kept(world) == {}
    assert seen >= {"drafts", "begun", "demanding", "spans", "limits", "waiting", "gate", "in flight"}
