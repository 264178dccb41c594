"""A change of level: its states and the moves between them, the swap batch under way, and the drain that makes room."""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal

from morphserve.config import KVConfig
from morphserve.control.ranks import BlockPoolPort, LayerFormats, Plan, ShrinkProgress
from morphserve.errors import next_state

logger = logging.getLogger(__name__)

Direction = Literal["degrade", "restore"]
Outcome = Literal["committed", "aborted", "cancelled"]
# where an error was caught; metrics have them all from the start, so that a first one is seen to come
ErrorPlace = Literal[
    "prepare", "rank_timeout", "kv_unknown", "ranks_unknown", "controller", "wind_down", "drain_replies", "clock",
    "monitor", "policy", "hooks", "on_level", "provenance", "decision_log",
]  # fmt: skip
_NOT_LOGGED = ("revision", "kv_blocks_gained")  # the line begins with the one, and has what the other is made of
_BARE = re.compile(r"[\w.:/+-]+", re.ASCII)  # a value that needs no quotes


class Phase(Enum):
    """The phase of one swap batch (a few layers and the KV blocks they pay for).

    ::

                  degrade, or a restore that needs no KV
              .------------------------------------------.
              |                                          v
            IDLE --restore--> DRAINING --> SHRINKING --> PREPARING --> COMMITTING --> IDLE
              ^                  |             |             |
              |<-- cancelled ----'             |             v
              |                                |          ABORTING
              |                                v             |
              |<------------------------- REGROWING <--------|  KV had been unmapped
              '<---------------------------------------------'  KV untouched

    DRAINING: the tail is fenced, live blocks move below it. SHRINKING: the tail left the pool (or was
    never published: another rank had mapped less), its unmapping is on its way. PREPARING: ranks stage
    the new layers; the only phase in which one of several ranks may fail or be too late. COMMITTING: they switch;
    cannot fail. ABORTING: ranks forget what they staged. REGROWING: blocks that were unmapped for nothing come back.

    At rest, too, IDLE goes to REGROWING now and then: for blocks of the level that a rank had no memory for.

    A rank that decides alone prepares within its commit: from IDLE or SHRINKING it goes to COMMITTING at once, and
    from there, where it could not prepare, to REGROWING.
    """

    IDLE = auto()
    DRAINING = auto()
    SHRINKING = auto()
    PREPARING = auto()
    COMMITTING = auto()
    ABORTING = auto()
    REGROWING = auto()


_NEXT: Mapping[Phase, frozenset[Phase]] = {
    Phase.IDLE: frozenset({Phase.DRAINING, Phase.SHRINKING, Phase.PREPARING, Phase.COMMITTING, Phase.REGROWING}),
    Phase.DRAINING: frozenset({Phase.SHRINKING, Phase.IDLE}),
    Phase.SHRINKING: frozenset({Phase.PREPARING, Phase.COMMITTING, Phase.REGROWING}),
    Phase.PREPARING: frozenset({Phase.COMMITTING, Phase.ABORTING}),
    Phase.COMMITTING: frozenset({Phase.REGROWING, Phase.IDLE}),
    Phase.ABORTING: frozenset({Phase.REGROWING, Phase.IDLE}),
    Phase.REGROWING: frozenset({Phase.IDLE}),
}


def check_move(revision: int, old: Phase, new: Phase) -> Phase:
    """Return `new`, if the table has the move.

    Raises:
        IllegalTransition: it has not.
    """
    return next_state(f"transition r{revision}", _NEXT, old, new)


@dataclass(frozen=True, slots=True)
class TransitionEnd:
    """How a transition has ended, when, and where: at `level`, with so many KV blocks published."""

    outcome: Outcome
    now_s: float
    level: int
    num_kv_blocks: int
    error: str = ""


@dataclass(slots=True)
class Transition:
    """A change of level, from the first swap batch in one direction until idle again, or until the direction turns.

    Its revision is the first of a rising run that its plans continue.
    """

    revision: int
    direction: Direction
    reason: str
    started_s: float
    blocks_before: int
    from_level: int = 0
    policy: str = ""  # of which kind, when it began
    order: str | None = None  # of an operator, in force when it began
    num_layers: int = 0  # layer switches committed so far
    last_format: str = ""
    longest_pause_s: float = 0.0  # that one command kept a rank from its next step

    def row(self, end: TransitionEnd) -> dict[str, Any]:
        """Return what status, log and spans say of it; docs/watching.md explains the keys, which stay."""
        return {
            "revision": self.revision,
            "direction": self.direction,
            "outcome": end.outcome,
            "from_level": self.from_level,
            "to_level": end.level,
            "num_layers": self.num_layers,
            "format": self.last_format or None,
            "kv_blocks_before": self.blocks_before,
            "kv_blocks_after": end.num_kv_blocks,
            "kv_blocks_gained": end.num_kv_blocks - self.blocks_before,
            "seconds": end.now_s - self.started_s,
            "pause_ms": 1e3 * self.longest_pause_s,
            "policy": self.policy,
            "order": self.order,
            "reason": self.reason,
            "error": end.error,
        }


class TransitionHistory:
    """The transitions that ended last, so many and no more: a status says why the level is what it is."""

    def __init__(self, size: int = 20) -> None:
        self._ended: deque[tuple[float, dict[str, Any]]] = deque(maxlen=size)
        self._failing: set[tuple[Direction, str]] = set()  # with the places, since it last reached a level
        self.on_end: Callable[[dict[str, Any]], None] | None = None  # is told of each, and must not raise

    def is_news(self, direction: Direction, outcome: Outcome, place: str) -> bool:
        """Return whether an end is another than those before it, back to the last that has reached its level.

        Args:
            place: what failed, of a few fixed names.
        """
        if outcome == "committed":
            self._failing = {(failing, where) for failing, where in self._failing if failing != direction}
        if outcome != "aborted":
            return True
        is_news = (direction, place) not in self._failing
        self._failing.add((direction, place))
        return is_news

    def add(self, transition: Transition, end: TransitionEnd, log_level: int = logging.INFO) -> None:
        """Remember a transition that has ended, and say so in one line."""
        row = transition.row(end)
        self._ended.append((end.now_s, row))
        said = {key: value for key, value in row.items() if key not in _NOT_LOGGED}
        logger.log(log_level, "morph r%d: %s", transition.revision, logfmt(said))
        if self.on_end is not None:
            self.on_end(row)

    def as_json(self, now_s: float) -> list[dict[str, Any]]:
        """Return them, the newest first, each with how long ago it ended."""
        return [{**row, "ended_ago_s": max(now_s - ended_s, 0.0)} for ended_s, row in reversed(self._ended)]


def logfmt(row: Mapping[str, Any]) -> str:
    """Return `key=value key=value`, one line whatever a text holds: one that is no single word is a JSON string."""
    return " ".join(f"{key}={_logfmt_value(value)}" for key, value in row.items())


def _logfmt_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)


@dataclass(slots=True)
class SwapBatch:
    """The layers under way, with the KV blocks they pay for. `runner.py` carries it out."""

    target: int  # the next level on the way to the transition's
    direction: Direction
    layers: LayerFormats
    new_bytes: tuple[int, ...]  # by rank: staged
    old_bytes: tuple[int, ...]  # by rank: freed on commit
    blocks_before: int
    blocks_after: int
    revision: int
    drain: Drain | None = None  # of the blocks that it gives up
    plan: Plan | None = None
    worker_s: float = 0.0  # what prepare took on the slowest rank
    end: BatchEnd | None = None
    was_between: bool = False  # two levels, before the switch: what is true again if it fails


@dataclass(frozen=True, slots=True)
class BatchEnd:
    """The end of a swap batch. `committed`: now nearer to its target. Else everything is as before it began."""

    outcome: Outcome
    num_layers: int = 0
    format: str = ""
    error: str = ""
    place: ErrorPlace | Literal[""] = "prepare"  # what an abort counts as among the errors; "" = as none
    num_kv_blocks: int = 0  # that a drain was to get down to and has not


@dataclass(slots=True)
class Preemptions:
    """The last resort of a shrink without room, bounded."""

    total: int = 0
    on_way_back: int = 0  # from the deepest level so far: what `kv.max_preemptions` bounds


class Drain:
    """The emptying of the pool's tail before it is unmapped: live blocks move below the fence, or requests wait."""

    def __init__(
        self, pool: BlockPoolPort, config: KVConfig, preemptions: Preemptions, num_kv_blocks: int, now_s: float
    ) -> None:
        """Put up the fence above `num_kv_blocks`."""
        self._pool = pool
        self._config = config
        self._preemptions = preemptions
        self._num_kv_blocks = num_kv_blocks
        self._progress_s = now_s  # when it last got anywhere
        self._num_live_tail = -1
        pool.begin_shrink(num_kv_blocks)

    def timed_out(self, now_s: float) -> str:
        """Return why it must be given up, '' while it need not."""
        stuck_s = now_s - self._progress_s
        if stuck_s <= self._config.drain_timeout_s:
            return ""
        return f"{self._num_live_tail} live blocks above {self._num_kv_blocks} found no room in {stuck_s:.1f} s"

    def advance(self, now_s: float) -> ShrinkProgress:
        """Move what finds room. Once nothing has for half of the time-out, preempt a request."""
        step = self._pool.advance_shrink(self._config.blocks_per_step)
        if step.copies or step.num_live_tail != self._num_live_tail:
            self._progress_s = now_s
            self._num_live_tail = step.num_live_tail
        elif step.num_live_tail and now_s - self._progress_s > self._config.drain_timeout_s / 2:
            self._preempt(now_s)
        return step

    def _preempt(self, now_s: float) -> None:
        preemptions = self._preemptions
        if preemptions.on_way_back < self._config.max_preemptions and self._pool.preempt_one():
            preemptions.on_way_back += 1
            preemptions.total += 1
            self._progress_s = now_s
