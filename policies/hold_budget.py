"""Seconds an hour for which some requests may decide the level of all."""

from __future__ import annotations

from typing import Any

_HOUR_S = 3600.0
_BACK_SHARE = 0.1  # of an hour's seconds: once they are spent, so many must be back before any counts


class HoldBudget:
    """Seconds as a bucket that an hour fills; 0 an hour is spent for good, and 3600 never is."""

    def __init__(self, per_hour_s: float) -> None:
        """Be full."""
        self.per_hour_s = per_hour_s
        self.left_s = per_hour_s
        self.is_spent = per_hour_s <= 0
        self._last_s: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what is left, as plain values."""
        return {"per_hour_s": self.per_hour_s, "left_s": self.left_s, "is_spent": self.is_spent}

    def take_over(self, last: HoldBudget) -> None:
        """Go on from another budget: what is spent of an hour stays so, whatever an hour has now."""
        self._last_s = last._last_s
        self.left_s = max(self.per_hour_s - (last.per_hour_s - last.left_s), 0.0)
        self.is_spent = self.left_s <= 0 or (last.is_spent and self.left_s < _BACK_SHARE * self.per_hour_s)

    def pay(self, now_s: float, has_held: bool) -> None:
        """Refill for the time since the last call, which `has_held` says is to be paid for."""
        elapsed_s = 0.0 if self._last_s is None else max(now_s - self._last_s, 0.0)
        self._last_s = now_s
        spent_s = elapsed_s if has_held else 0.0
        left_s = self.left_s - spent_s + elapsed_s * self.per_hour_s / _HOUR_S
        self.left_s = min(max(left_s, 0.0), self.per_hour_s)
        if self.left_s <= 0:
            self.is_spent = True
        elif self.left_s >= _BACK_SHARE * self.per_hour_s:
            self.is_spent = False
