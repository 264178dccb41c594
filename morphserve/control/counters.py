"""What the metrics read of the controller."""

from __future__ import annotations

from dataclasses import dataclass, field

from morphserve.control.transition import Direction, Outcome


@dataclass(slots=True)
class Counters:
    """Counters rise for ever; `num_blocks_*` and `last_pause_s` are gauges."""

    transitions: dict[tuple[Direction, Outcome], int] = field(default_factory=dict)
    transition_seconds: float = 0.0  # from start to end, all transitions together
    last_pause_s: float = 0.0  # worker seconds between two forward passes, newest that was not 0
    max_pause_s: float = 0.0
    num_layers_switched: int = 0
    num_blocks_published: int = 0
    num_blocks_mapped: int = 0  # fewest of any rank, as last reported
    short_grows: int = 0  # a rank mapped fewer blocks than asked
    forced_preemptions: int = 0  # requests that a shrink without room has preempted
    errors: dict[str, int] = field(default_factory=dict)  # by place

    def count_transition(self, direction: Direction, outcome: Outcome) -> None:
        """A transition has ended."""
        key = (direction, outcome)
        self.transitions[key] = self.transitions.get(key, 0) + 1

    def count_error(self, place: str) -> None:
        """An error was caught; `place` is one of a few fixed names."""
        self.errors[place] = self.errors.get(place, 0) + 1
