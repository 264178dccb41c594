"""How often the level may change, how much quality may be spent, and how many may wait."""

from __future__ import annotations

from collections.abc import Sequence

from policies.slo.predictor import Load, Prediction, Predictor

_HOUR_S = 3600.0
_REFUSE_SHARE = 0.3  # of requests late at the best level: from there on new ones are refused,
_ACCEPT_SHARE = 0.1  # until so few are,
_QUEUE_SHARE = 0.5  # and those who wait are to be served within that share of the promised time


class TokenBucket:
    """A limit on changes: so many a minute on average, a third of a minute's worth at once."""

    def __init__(self, per_minute: float) -> None:
        self._rate = per_minute / 60.0
        self.capacity = max(per_minute / 3.0, 2.0)
        self.level = self.capacity
        self._last_s: float | None = None

    def refill(self, now_s: float) -> None:
        """Add what the time that has passed is worth."""
        if self._last_s is not None:
            self.level = min(self.capacity, self.level + max(now_s - self._last_s, 0.0) * self._rate)
        self._last_s = now_s

    def take(self) -> None:
        """Pay for one change."""
        self.level -= 1.0


class QualityBudget:
    """KL that may be spent per hour, as a bucket that an hour fills. Once empty, it must be a tenth full again."""

    def __init__(self, per_hour: float | None) -> None:
        self._per_hour = per_hour
        self._left = per_hour or 0.0
        self._last_s: float | None = None
        self.spent = 0.0  # nats since start
        self.exhausted = False

    def update(self, now_s: float, num_tokens: int, kl_per_token: float) -> None:
        """Charge `num_tokens` that came out at a level that costs so much, and refill for the time since."""
        cost = num_tokens * kl_per_token
        self.spent += cost
        if self._per_hour is None:
            return
        elapsed_s = 0.0 if self._last_s is None else max(now_s - self._last_s, 0.0)
        self._last_s = now_s
        self._left = min(self._per_hour, self._left - cost + elapsed_s * self._per_hour / _HOUR_S)
        if self._left <= 0:
            self.exhausted = True
        elif self._left >= 0.1 * self._per_hour:
            self.exhausted = False


class QueueLimit:
    """How many prompt tokens may wait while no level keeps the promise: a late answer helps nobody."""

    def __init__(self, predictor: Predictor, is_on: bool) -> None:
        """Refuse nobody. `is_on`: False = ever."""
        self._predictor = predictor
        self._is_on = is_on
        self.num_tokens: int | None = None  # None = any number

    def lift(self) -> None:
        """Refuse nobody any more."""
        self.num_tokens = None

    def stays_open(self, prediction: Prediction) -> bool:
        """Return whether nobody is refused now, nor would be at a level that is predicted so, whatever others do."""
        return not self._is_on or (self.num_tokens is None and prediction.share <= _REFUSE_SHARE)

    def weigh(self, predictions: Sequence[Prediction], load: Load) -> None:
        """Let no more wait than are served in time, where the best of these levels from 0 on has too many late."""
        if not self._is_on:
            return
        best = min(range(len(predictions)), key=lambda level: predictions[level].violations)
        if predictions[best].share > (_REFUSE_SHARE if self.num_tokens is None else _ACCEPT_SHARE):
            served = self._predictor.release_rate(best, load) * load.ttft_s * _QUEUE_SHARE
            self.num_tokens = max(int(served * load.typical.prompt_tokens), 1)
        else:
            self.lift()
