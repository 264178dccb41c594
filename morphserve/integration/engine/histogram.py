"""A histogram of fixed size: what a Prometheus histogram needs, at the cost of one comparison per bucket."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

EDGES_S = (2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2)  # upper edges


class TimeHistogram:
    """Counts of durations by bucket. Nothing in it grows."""

    def __init__(self) -> None:
        self.counts = [0] * (len(EDGES_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Add one more duration."""
        self.counts[bisect_left(EDGES_S, seconds)] += 1
        self.sum_s += seconds

    def as_json(self) -> dict[str, Any]:
        """Upper edges in seconds (the last bucket has none), counts, and the sum."""
        return {"edges_s": list(EDGES_S), "counts": list(self.counts), "sum_s": self.sum_s}
