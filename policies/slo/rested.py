"""Since when each shallower level would have done."""

from __future__ import annotations

from collections.abc import Sequence

_QUICK_SHARE = 0.1


def quick_dwell_s(dwell_s: float, way_s: float) -> float:
    """Return the dwell while level 0 serves the load: a tenth, but as long as the way back takes, which then pays."""
    return min(dwell_s, max(_QUICK_SHARE * dwell_s, way_s))


class Rested:
    """The dwell of each level: it begins anew whenever the level would not do."""

    def __init__(self, num_levels: int) -> None:
        """Know of nothing yet."""
        self.since_s: list[float | None] = [None] * num_levels  # None = would not do now

    def forget(self) -> None:
        """Begin all dwells anew."""
        self.since_s = [None] * len(self.since_s)

    def shallowest(self, now_s: float, does: Sequence[bool], costs: Sequence[float], dwell_s: float) -> int:
        """Return the shallowest level that has done throughout a dwell, at no higher cost; else the one it is from.

        Args:
            now_s: monotonic clock.
            does: whether each level shallower than the one it is from would do now.
            costs: by level, nats per token.
            dwell_s: how long.
        """
        chosen = len(does)
        for level in reversed(range(len(does))):
            since_s = self.since_s[level]
            if not does[level]:
                self.since_s[level] = None
            elif since_s is None:
                self.since_s[level] = now_s
            elif now_s - since_s >= dwell_s and costs[level] <= costs[chosen]:
                chosen = level
        return chosen
