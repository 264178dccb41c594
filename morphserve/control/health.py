"""What goes wrong, and what follows: the controller's health, its counters, and when the next attempt may start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from morphserve.config import TransitionConfig
from morphserve.control.transition import Direction, Outcome
from morphserve.errors import IllegalTransition

_FIRST_RETRY_S = 1.0  # where failures may be tried again at once: of what fails once more, too
_OTHER: dict[Direction, Direction] = {"degrade": "restore", "restore": "degrade"}


class Health(Enum):
    """The state of the controller and of what feeds it. Nothing gets well again: no error is met at every step.

    ::

                   the policy, or what feeds it, fails               a transition breaks half-way
          RUNNING ------------------------------------> RESTING ------------------------------------> DEAD
             |                                           ^   |                                         ^
             |                          fails once more  '---'                                         |
             '----------------------------- a transition breaks half-way ------------------------------'

          RUNNING, RESTING, DEAD -- what a rank holds is unknown, or not what the others hold --> LOST

    RUNNING: the policy is asked at every step. RESTING: it is asked no more; what is under way is finished or undone,
    and the engine stays at the level it then has. DEAD: nothing is sent any more; all ranks have what they are served
    from, and answers that still come are looked at. LOST: they have not, or nobody knows: the engine must end. The
    hooks that feed the controller have a health of their own, and never die: at rest they look at nothing more, but
    tick the controller on.
    """

    RUNNING = auto()
    RESTING = auto()
    DEAD = auto()
    LOST = auto()

    def to(self, new: Health) -> Health:
        """Return `new`, if the table has the move.

        Raises:
            IllegalTransition: it has not.
        """
        if new not in _NEXT[self]:
            legal = ", ".join(sorted(health.name for health in _NEXT[self])) or "none"
            raise IllegalTransition(f"health: {self.name} -> {new.name}; legal from here: {legal}.")
        return new


_NEXT: Mapping[Health, frozenset[Health]] = {
    Health.RUNNING: frozenset({Health.RESTING, Health.DEAD, Health.LOST}),
    Health.RESTING: frozenset({Health.RESTING, Health.DEAD, Health.LOST}),
    Health.DEAD: frozenset({Health.LOST}),
    Health.LOST: frozenset(),
}


class BackOff:
    """The waits after failures: what keeps failing waits twice as long each time, up to a limit.

    Each attempt of a restore takes KV away from running requests for nothing, and writes a warning: a damaged
    file must not cost that every few seconds for days. Directions count apart, because a restore that fails for
    ever must not keep the engine from degrading in a burst, nor look healed because degrading works.
    """

    def __init__(self, config: TransitionConfig) -> None:
        self._first_s = config.backoff_s
        self._longest_s = max(config.backoff_s, config.backoff_max_s)
        self._next_wait_s: dict[Direction, float] = {}  # of directions whose last attempt failed
        self._not_before_s: dict[Direction, float] = {}
        self._full_at = 0  # blocks that the last drain did not get down to; 0 = no drain has timed out

    def allows(self, now_s: float, direction: Direction) -> bool:
        """Return whether an attempt may start now."""
        return now_s >= self._not_before_s.get(direction, now_s)

    def would_allow(self, now_s: float, direction: Direction, num_used_blocks: int) -> bool:
        """Return whether an attempt might start now, if `see_room` were told of these blocks. Changes nothing."""
        has_room = direction == "restore" and num_used_blocks < self._full_at
        return has_room or self.allows(now_s, direction)

    def failed(self, now_s: float, direction: Direction) -> float:
        """Return how long nothing starts in `direction`, in seconds."""
        wait_s = self._next_wait_s.get(direction, self._first_s)
        self._next_wait_s[direction] = min(2 * wait_s or _FIRST_RETRY_S, self._longest_s)
        self._full_at = 0  # a fault's wait is not ended by room
        self._hold(_OTHER[direction], now_s + self._first_s)
        return self._hold(direction, now_s + wait_s) - now_s

    def drain_timed_out(self, now_s: float, num_kv_blocks: int, num_used_blocks: int) -> float:
        """Return how long no restore starts after a cache that was too full: no fault, so no longer the second time.

        Args:
            num_kv_blocks: what the cache was to shrink to, null block included.
            num_used_blocks: those that live requests hold. Where they would have fitted, something else stood
                in the way, and only time ends the wait.
        """
        self._full_at = num_kv_blocks if num_used_blocks >= num_kv_blocks else 0
        return self._hold("restore", now_s + self._first_s) - now_s

    def see_room(self, num_used_blocks: int) -> None:
        """End a wait for room once what live requests hold would fit."""
        if num_used_blocks < self._full_at:
            self._not_before_s.pop("restore", None)

    def succeeded(self, direction: Direction) -> None:
        """Forget the failures of a direction that has reached its level."""
        self._next_wait_s.pop(direction, None)

    def _hold(self, direction: Direction, until_s: float) -> float:
        until_s = max(until_s, self._not_before_s.get(direction, until_s))
        self._not_before_s[direction] = until_s
        return until_s


class Retry:
    """When to ask again for what was not to be had: each wait is twice as long as the one before, up to a limit."""

    def __init__(self, config: TransitionConfig) -> None:
        self._first_s = max(config.backoff_s, _FIRST_RETRY_S)
        self._longest_s = max(config.backoff_max_s, self._first_s)
        self._wait_s = 0.0
        self._next_s = 0.0

    def reset(self) -> None:
        """Begin anew with the next question."""
        self._wait_s = 0.0

    def is_due(self, now_s: float) -> bool:
        """Return whether to ask now; the first wait begins with the first call."""
        if self._wait_s and now_s < self._next_s:
            return False
        due = self._wait_s > 0
        self._wait_s = min(2 * self._wait_s, self._longest_s) if due else self._first_s
        self._next_s = now_s + self._wait_s
        return due


@dataclass(slots=True)
class Counters:
    """The figures that the metrics read. Counters rise for ever; `num_blocks_*` and `last_pause_s` are gauges."""

    transitions: dict[tuple[Direction, Outcome], int] = field(default_factory=dict)
    transition_seconds: float = 0.0  # from start to end, all transitions together
    last_pause_s: float = 0.0  # worker seconds between two forward passes, newest that was not 0
    max_pause_s: float = 0.0
    num_layers_switched: int = 0
    num_blocks_published: int = 0
    num_blocks_mapped: int = 0  # fewest of any rank, as last reported
    short_grows: int = 0  # a rank mapped fewer blocks than asked
    forced_preemptions: int = 0  # requests that a shrink without room has preempted
    decisions_dropped: int = 0  # that the decision log should have, and has not
    errors: dict[str, int] = field(default_factory=dict)  # by place
    orders: dict[str, int] = field(default_factory=dict)  # of operators, by kind and what became of them, KIND_OUTCOME

    def count_transition(self, direction: Direction, outcome: Outcome) -> None:
        """Count a transition that has ended."""
        key = (direction, outcome)
        self.transitions[key] = self.transitions.get(key, 0) + 1

    def count_order(self, kind: str, outcome: str) -> None:
        """Count an operator's order that was taken or refused, or has ended; both are of a few fixed words."""
        key = f"{kind}_{outcome}"
        self.orders[key] = self.orders.get(key, 0) + 1

    def count_error(self, place: str) -> None:
        """Count an error that was caught; `place` is one of a few fixed names."""
        self.errors[place] = self.errors.get(place, 0) + 1
