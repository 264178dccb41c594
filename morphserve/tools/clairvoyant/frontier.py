"""What a run cost and whom it kept waiting, and the runs that no other one beats in both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from morphserve.tools.sim import Schedule


@dataclass(frozen=True, slots=True)
class Point:
    """A whole run."""

    late: int  # requests that broke a promise; refused and unfinished ones did
    kl: float  # expected, nats per token
    schedule: Schedule
    source: str  # what the run is, in words
    nats: Mapping[int, float] = field(default_factory=dict, compare=False)  # expected KL summed over tokens, by level


class Frontier:
    """Of all runs seen, for each number of late requests the cheapest, where it is cheaper than all with fewer."""

    def __init__(self) -> None:
        """Begin without any run."""
        self._points: list[Point] = []  # late rises, cost falls

    def __iter__(self) -> Iterator[Point]:
        return iter(self._points)

    def offer(self, point: Point) -> bool:
        """Take in a run; return whether no other beats it or does as well."""
        if any(kept.late <= point.late and kept.kl <= point.kl for kept in self._points):
            return False
        kept = [each for each in self._points if each.late < point.late or each.kl < point.kl]
        self._points = sorted([*kept, point], key=lambda each: each.late)
        return True

    def best(self, max_late: int) -> Point:
        """Return the cheapest run with no more late requests; where there is none, the one with the fewest.

        Raises:
            IndexError: nothing was offered.
        """
        allowed = [point for point in self._points if point.late <= max_late]
        return allowed[-1] if allowed else self._points[0]
