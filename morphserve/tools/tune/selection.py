"""What a study found: the Pareto front, the policy for each limit on violations, and how it does on other traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from morphserve.tools.bench import percent
from morphserve.tools.tune.baselines import CURRENT, STOCK, Baseline
from morphserve.tools.tune.score import Score, Scores

_TIE = 1e-12  # a limit of 1 % met exactly is met


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tuned policy on the front."""

    number: int  # of its trial
    values: Mapping[str, Any]
    scores: Scores

    @property
    def dev(self) -> Score:
        """Score on all dev windows."""
        return self.scores.on_dev

    @property
    def held_out(self) -> Score | None:
        """Score on all held-out windows."""
        return self.scores.on_held_out


@dataclass(frozen=True, slots=True)
class Best:
    """The policy of least cost within a limit."""

    limit: float  # on the violation rate, dev windows
    candidate: Candidate | None  # None: no trial keeps the limit

    @property
    def name(self) -> str:
        """Stem of its file's name."""
        return f"best_le_{self.limit * 100:g}pct"


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return those that no other dominates on the dev windows, fewest violations first; of equals the first."""
    ordered = sorted(candidates, key=lambda c: (c.dev.violations, c.dev.cost, c.number))
    front: list[Candidate] = []
    for candidate in ordered:
        if not front or candidate.dev.cost < front[-1].dev.cost:
            front.append(candidate)
    return front


def best_within(front: Sequence[Candidate], limits: Sequence[float]) -> list[Best]:
    """Return one for each limit. The front has them all: it goes down in cost as violations go up."""
    return [
        Best(limit, next((c for c in reversed(front) if c.dev.violations <= limit + _TIE), None)) for limit in limits
    ]


def warnings_of(best: Sequence[Best], baselines: Sequence[Baseline], front: Sequence[Candidate]) -> list[str]:
    """Say what a user must know before serving with one of these, most important first."""
    found = [w for on_held_out in (False, True) for w in _dominated(best, baselines, on_held_out)]
    current = next(baseline for baseline in baselines if baseline.name == CURRENT)
    names: dict[int, list[str]] = {}  # one policy may be the cheapest within several limits
    tuned = {p.candidate.number: p.candidate for p in best if p.candidate is not None}
    for p in best:
        if p.candidate is not None:
            names.setdefault(p.candidate.number, []).append(p.name)
    found += [w for number, own in names.items() if (w := _not_better(", ".join(own), tuned[number], current))]
    found += _broken_limits(best)
    missing = [percent(p.limit) for p in best if p.candidate is None]
    if missing:
        least = percent(front[0].dev.violations)
        found.append(f"no trial keeps violations at {' or '.join(missing)} on the dev windows; the fewest are {least}.")
    if not baselines[0].scores.held_out:
        found.append("no held-out window: nothing is known about traffic that was not tuned on. Give --held-out TRACE.")
    return found


def _dominated(best: Sequence[Best], baselines: Sequence[Baseline], on_held_out: bool) -> list[str]:
    """Name static baselines that are no worse than the best policies."""
    where = "held-out" if on_held_out else "dev"
    found = []
    for baseline in baselines:
        own = baseline.scores.on_held_out if on_held_out else baseline.scores.on_dev
        if own is None or not baseline.is_static:
            continue
        beaten = []
        for p in best:
            tuned = None if p.candidate is None else p.candidate.held_out if on_held_out else p.candidate.dev
            if tuned is not None and own.no_worse_than(tuned):
                beaten.append(p.name)
        if beaten:
            what = "No morphing is needed there" if baseline.name == STOCK else "Serving with it for good is as good"
            found.append(
                f"{baseline.name} dominates {', '.join(beaten)} on the {where} windows: {in_words(own)} is no more "
                f"violations at no more cost. {what}."
            )
    return found


def _not_better(names: str, candidate: Candidate, current: Baseline) -> str | None:
    """Say that the current policy does as well: on what neither was tuned on, or even where the search looked."""
    on_dev = current.scores.on_dev
    if on_dev.no_worse_than(candidate.dev):
        return (
            f"{names}: not better than the current policy even on the dev windows: {in_words(candidate.dev)} "
            f"against {in_words(on_dev)}. Run more trials, or let the space include the current values."
        )
    own, before = candidate.held_out, current.scores.on_held_out
    if own is None or before is None or not before.no_worse_than(own):
        return None
    return (
        f"{names}: not better than the current policy on the held-out windows: {in_words(own)} against "
        f"{in_words(before)}. Keep the current policy, or tune on more traces."
    )


def _broken_limits(best: Sequence[Best]) -> list[str]:
    found = []
    for p in best:
        own = None if p.candidate is None else p.candidate.held_out
        if own is not None and own.violations > p.limit + _TIE:
            found.append(
                f"{p.name} does not keep its limit on the held-out windows: {percent(own.violations)} violations, "
                f"at most {percent(p.limit)} were asked for."
            )
    return found


def verdict(candidate: Candidate, current: Baseline) -> str:
    """Judge the tuned policy against the current one, on held-out windows where there are any."""
    own, before, where = candidate.held_out, current.scores.on_held_out, "held-out"
    if own is None or before is None:
        own, before, where = candidate.dev, current.scores.on_dev, "dev"
    if own.dominates(before):
        return f"better than current on {where}"
    if before.no_worse_than(own):
        return f"not better than current on {where}"
    fewer = own.violations < before.violations
    return f"{'fewer violations, more' if fewer else 'more violations, less'} cost than current on {where}"


def in_words(score: Score) -> str:
    """Put both objectives into words."""
    return f"{percent(score.violations)} violations at {score.cost:.4f} nats/token"
