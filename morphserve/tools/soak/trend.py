"""What a series of samples does over time: its slope, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slope:
    """A straight line through samples, by least squares. `error` is the slope's standard error."""

    per_hour: float
    error: float
    num_samples: int

    def beyond(self, other: Slope) -> Slope:
        """Return by how much this one is steeper."""
        error = math.hypot(self.error, other.error)
        return Slope(self.per_hour - other.per_hour, error, min(self.num_samples, other.num_samples))

    def as_json(self) -> dict[str, float]:
        """Return it for a report."""
        return {"per_hour": round(self.per_hour, 4), "error": round(self.error, 4), "num_samples": self.num_samples}


def slope(points: Sequence[tuple[float, float]]) -> Slope | None:
    """Fit a line through (seconds, value); None with fewer than three points, or without time between them."""
    count = len(points)
    if count < 3:
        return None
    hours = [seconds / 3600 for seconds, _ in points]
    mid = sum(hours) / count
    spread = sum((hour - mid) ** 2 for hour in hours)
    if spread == 0:
        return None
    level = sum(value for _, value in points) / count
    steep = sum((hour - mid) * (value - level) for hour, (_, value) in zip(hours, points, strict=True)) / spread
    rest = sum((value - level - steep * (hour - mid)) ** 2 for hour, (_, value) in zip(hours, points, strict=True))
    return Slope(steep, math.sqrt(rest / (count - 2) / spread), count)


def percentile(edges_s: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """Return below what so many of a histogram's durations are, interpolated in its bucket; None for an empty one.

    Args:
        edges_s: upper edges; the last bucket has none, and counts as its lower edge.
        counts: by bucket.
        share: in [0, 1].
    """
    left = share * sum(counts)
    if left <= 0:
        return None
    lower = 0.0
    for edge, count in zip(edges_s, counts, strict=False):
        if left <= count:
            return lower + (edge - lower) * left / count
        left, lower = left - count, edge
    return lower
