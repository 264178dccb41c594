"""Which level is worth its cost: the price of a late request against nats per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies.slo.predictor import Load, Prediction, Predictor

_AS_QUICK = 1.02  # times the quickest shallower level's step: within what such measurements scatter
_PEAK = 1.2  # of a burst, over what is forecast
_SAVED = 1.0  # requests that a level which computes slower must save
_SAVED_SHARE = 0.5  # and so many of those that would be late: half is beyond the error of a prediction


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms on which levels are compared: of one load, the same for all."""

    price: float  # nats per request that is saved
    costs: Sequence[float]  # by level, nats per token
    tokens: float  # of the answers that hold a level: of who is here, and of who comes within the horizon
    quick_end: int  # the last of the levels of which each computes as fast as those before it
    lasting: int  # the shallowest of these whose compute keeps up if the load lasts

    def total(self, level: int, prediction: Prediction) -> float:
        """Return what a level costs, in nats: late requests at their price, and the tokens of answers."""
        return self.price * prediction.violations + self.costs[level] * self.tokens

    def is_enough(self, level: int, prediction: Prediction, target: float) -> bool:
        """Return whether a level that is predicted so wants no deeper one, whatever those would do: it keeps the
        promise, and none could save what it costs."""
        saved, here = self.price * prediction.violations, self.costs[level]
        is_dearer = all(saved <= (cost - here) * self.tokens for cost in self.costs[level + 1 :])
        return level >= self.lasting and prediction.keeps(target) and is_dearer

    def best(self, predictions: Sequence[Prediction], target: float) -> int:
        """Return the level that costs least.

        Where not even that one keeps the promise the quickest is taken at once: what it does not serve now is late
        soon. But not where the way there alone makes more late than it can save. A level that computes slower is for
        those that its room saves, and must save them: a crowd that it lets in has its tokens late.
        """
        totals = [self.total(level, prediction) for level, prediction in enumerate(predictions)]
        best = min(range(self.quick_end + 1), key=lambda level: (totals[level], level))
        best = max(best, self.lasting)
        late = predictions[best].violations
        if not predictions[best].keeps(target) and _SAVED_SHARE * predictions[self.quick_end].violations <= late:
            best = self.quick_end
        slower = [level for level in range(self.quick_end + 1, len(totals)) if totals[level] < totals[best]]
        if not slower:
            return best
        deeper = min(slower, key=lambda level: (totals[level], level))
        late = predictions[best].violations
        return deeper if late - predictions[deeper].violations > max(_SAVED, _SAVED_SHARE * late) else best


class PutOff:
    """A deeper level that is put off while it would do later, too, and requests lost by that cost less than the level.

    The least that would be lost, taken at any look so far, is remembered: each look alone would grant as much again.
    """

    def __init__(self) -> None:
        self._lost: float | None = None  # requests; None = nothing is put off

    def forget(self) -> None:
        """Put nothing off any more."""
        self._lost = None

    def may_go_on(
        self, terms: Terms, way: tuple[int, int], now: Prediction, later: Sequence[Prediction], target: float
    ) -> bool:
        """Return whether to put the level off once more.

        Args:
            terms: of this load.
            way: the level that the engine is at, and the one that it would go to.
            now: prediction of that level, taken now.
            later: predictions of that level and deeper ones, taken later.
            target: share of requests that may break the promise.
        """
        self._lost = min(now.violations, now.violations if self._lost is None else self._lost)
        least = min(later, key=lambda prediction: prediction.violations)
        start, end = way
        lost_nats = terms.price * (least.violations - self._lost)
        return least.keeps(target) and lost_nats <= (terms.costs[end] - terms.costs[start]) * terms.tokens


def quick_end(predictor: Predictor, load: Load, num_levels: int) -> int:
    """Return the last of the levels of which each computes as fast as those before it, however many run."""
    quickest = predictor.full_step_s(0, load)
    for level in range(1, num_levels):
        usual = predictor.full_step_s(level, load)
        if usual > _AS_QUICK * quickest:
            return level - 1
        quickest = min(quickest, usual)
    return num_levels - 1


def lasting(predictor: Predictor, load: Load, rate: float, end: int) -> int:
    """Return the shallowest level up to `end` whose compute keeps up with so many requests per second; else `end`."""
    for level in range(end):
        if predictor.lasting_tpot_s(level, load, rate) <= load.tpot_s:
            return level
    return end


def for_burst(predictor: Predictor, load: Load, rate: float, end: int) -> int:
    """Return the shallowest level up to `end` that serves a burst and its peak until the horizon; else `end`.

    By ends, and by what is free, whatever waits are predicted: who is let in at its start is still there at its peak.
    """
    return next((level for level in range(end) if predictor.served_rate(level, load) >= _PEAK * rate), end)
