"""What goes wrong, and what is counted: the controller's health, and its counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from morphserve.control.transition import Direction, ErrorPlace, Outcome
from morphserve.errors import next_state


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
        return next_state("health", _NEXT, self, new)


_NEXT: Mapping[Health, frozenset[Health]] = {
    Health.RUNNING: frozenset({Health.RESTING, Health.DEAD, Health.LOST}),
    Health.RESTING: frozenset({Health.RESTING, Health.DEAD, Health.LOST}),
    Health.DEAD: frozenset({Health.LOST}),
    Health.LOST: frozenset(),
}


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
    errors: dict[ErrorPlace, int] = field(default_factory=dict)
    orders: dict[str, int] = field(default_factory=dict)  # of operators, by kind and what became of them, KIND_OUTCOME

    def count_transition(self, direction: Direction, outcome: Outcome) -> None:
        """Count a transition that has ended."""
        key = (direction, outcome)
        self.transitions[key] = self.transitions.get(key, 0) + 1

    def count_order(self, kind: str, outcome: str) -> None:
        """Count an operator's order that was taken or refused, or has ended; both are of a few fixed words."""
        key = f"{kind}_{outcome}"
        self.orders[key] = self.orders.get(key, 0) + 1

    def count_error(self, place: ErrorPlace) -> None:
        """Count an error that was caught."""
        self.errors[place] = self.errors.get(place, 0) + 1
