"""How likely a request is late: by everyone's promise, or by its own where a level keeps that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import erfc, log, sqrt

from policies.promise import Promise
from policies.types import Cohort

_KEPT_SHARE = 0.3  # late at most: then a level keeps a promise
_SQRT2 = sqrt(2.0)


@dataclass(frozen=True, slots=True)
class Late:
    """Requests, and how many of them are expected to be late."""

    violations: float
    requests: float


class Tally:
    """The requests of one prediction.

    Those with a promise of their own that is stricter than everyone's are held apart: whether that one counts, the
    predictions of all levels say together (`kept_by_any`).
    """

    def __init__(self) -> None:
        self._violations = self._requests = 0.0
        self._strict: list[tuple[Late, Late]] = []  # by their own limit, by everyone's

    def add(self, late: Late) -> None:
        """Count requests."""
        self._violations += late.violations
        self._requests += late.requests

    def judge(self, own_s: float | None, usual_s: float, by: Callable[[float], Late]) -> None:
        """Count requests that have a limit of their own (None = they have not), where `by` judges by a limit."""
        if own_s is None or own_s >= usual_s:
            self.add(by(usual_s if own_s is None else own_s))
        else:
            self._strict.append((by(own_s), by(usual_s)))

    def keeps(self) -> list[bool]:
        """Return, for all that are held apart, whether this level keeps their own promise."""
        return [own.violations <= _KEPT_SHARE * own.requests for own, _ in self._strict]

    def total(self, is_kept: Sequence[bool]) -> Late:
        """Return all together, those that are held apart by their own promise where it is kept, else by everyone's."""
        chosen = [own if kept else usual for kept, (own, usual) in zip(is_kept, self._strict, strict=True)]
        return Late(
            self._violations + sum(late.violations for late in chosen),
            self._requests + sum(late.requests for late in chosen),
        )


def kept_by_any(by_level: Sequence[Sequence[bool]]) -> list[bool]:
    """Return, for all that are held apart, whether any of these levels keeps their own promise.

    A promise that none keeps is no reason for one: neither to degrade, nor against a restore, nor to shed others. Who
    asks for it is then served as one that asks for nothing.
    """
    return [any(kept) for kept in zip(*by_level, strict=True)]


@dataclass(frozen=True, slots=True)
class Moment:
    """What decides who of the waiting requests is lost already."""

    now_s: float
    step_s: float
    tpot_s: float  # as it is now
    output_tokens: float
    patience_s: float  # of a preempted request that is lost already: everyone's promised wait


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a cohort: those that can still make it, or those that cannot."""

    num_requests: float
    num_tokens: float
    left_s: float  # from now to the limit
    is_lost: bool


def parts_of(cohort: Cohort, limit_s: float, tpot_s: float, at: Moment) -> tuple[Part, ...]:
    """Split a cohort, which came evenly between its first and its last, at those that are lost already.

    A lost request is no reason for any level to keep its promise, but its answer is still wanted: it counts a little,
    as one that has just come. Who is lost depends on the engine as it is: a level that would lose more pays for them.

    Args:
        cohort: who waits.
        limit_s: of the wait, of those that have a token of the time per token.
        tpot_s: as predicted.
        at: as it is.
    """
    count, tokens = float(cohort.num_requests), float(cohort.num_tokens)
    if cohort.has_token:  # may spend on waiting what its tokens leave of its time
        waited_s = at.now_s - cohort.last_arrival_s
        spare_s = (limit_s - tpot_s) * at.output_tokens
        lost = (limit_s - at.tpot_s) * at.output_tokens - waited_s <= at.step_s
        return (Part(count, tokens, max(spare_s, at.patience_s) if lost else spare_s - waited_s, lost),)
    first, last = cohort.first_arrival_s, cohort.last_arrival_s
    alive_from = at.now_s - limit_s + at.step_s
    if alive_from <= first:
        return (Part(count, tokens, (first + last) / 2 + limit_s - at.now_s, False),)
    if alive_from >= last:
        return (Part(count, tokens, limit_s, True),)
    alive = (last - alive_from) / (last - first)
    return (
        Part(count * (1 - alive), tokens * (1 - alive), limit_s, True),
        Part(count * alive, tokens * alive, (alive_from + last) / 2 + limit_s - at.now_s, False),
    )


def has_lost(cohorts: Iterable[Cohort], promise: Promise, ttft_s: float, tpot_s: float, at: Moment) -> bool:
    """Return whether somebody who waits is lost already: by the limits given, or looser ones of its own."""

    def parts(cohort: Cohort) -> tuple[Part, ...]:
        if cohort.has_token:
            own_s, usual_s = promise.own_tpot_s(cohort.tpot_s), tpot_s
        else:
            own_s, usual_s = promise.own_ttft_s(cohort.ttft_s), ttft_s
        return parts_of(cohort, max(own_s or 0.0, usual_s), at.tpot_s, at)

    return any(part.is_lost for cohort in cohorts for part in parts(cohort))


def chance_late(predicted: float, limit: float, sigma: float) -> float:
    """Return the probability that what is predicted to take so long takes longer than `limit` (log-normal error)."""
    if predicted <= 0:
        return 0.0
    if limit <= 0:
        return 1.0
    distance = log(predicted) - log(limit)  # not of the ratio: a limit may be as large as a float can be
    if abs(distance) > 6 * sigma:
        return 1.0 if distance > 0 else 0.0
    return 0.5 * erfc(-distance / (max(sigma, 1e-6) * _SQRT2))


def either(one: float, other: float) -> float:
    """Return the probability that at least one of two independent things happens."""
    return one + other - one * other
