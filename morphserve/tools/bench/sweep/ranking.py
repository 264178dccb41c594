"""Which of several runs is best? Over all windows, two at a time, and against a format for good."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from morphserve.tools.bench.comparison import STATIC, STOCK
from morphserve.tools.bench.report.tables import Row
from morphserve.tools.bench.sweep.agreement import Rows

_SAME_RATE = 0.01  # violation rates that differ by no more are the same
_SAME_KL = 0.05  # quality costs, relative


@dataclass(frozen=True, slots=True)
class Total:
    """One run over all windows, as if they were one."""

    run: str
    violation_rate: float
    expected_kl_per_token: float | None  # None: not measured


def totals(rows: Rows) -> list[Total]:
    """Rank every run over all windows, best first: fewest violations, then least quality cost.

    Repeats count together. Stock vLLM costs nothing.
    """
    runs = dict.fromkeys(run for _, run in rows)
    return sorted(
        (_total(run, [r for (_, name), rs in rows.items() if name == run for r in rs]) for run in runs), key=_rank
    )


def _total(run: str, rows: Sequence[Row]) -> Total:
    sent = sum(row["sent"] for row in rows)
    late = sum(row["violation_rate"] * row["sent"] for row in rows)
    weights = [row["output_tok_s"] * row["duration_s"] for row in rows]
    kls = [0.0 if run == STOCK else row["expected_kl_per_token"] for row in rows]
    known = [kl for kl in kls if kl is not None]
    is_known = len(known) == len(kls) and sum(weights) > 0  # nothing came out: no token cost anything
    kl = sum(a * b for a, b in zip(known, weights, strict=True)) / sum(weights) if is_known else None
    return Total(run, late / sent, kl)


def _rank(total: Total) -> tuple[float, float]:
    kl = total.expected_kl_per_token
    return (round(total.violation_rate, 2), float("inf") if kl is None else kl)


@dataclass(frozen=True, slots=True)
class Order:
    """Which of two runs is better over all windows: 1 = the first, -1 = the second, 0 = they cannot be told apart."""

    runs: tuple[str, str]
    measured: int
    simulated: int


def orders(measured: Sequence[Sequence[Total]], simulated: Sequence[Sequence[Total]]) -> list[Order]:
    """Order every pair of runs by violations and, where these cannot tell, by quality cost.

    A figure tells two runs apart when their means differ by more than a point (violations) or 5 % (cost), and no
    repeat and no speed says the contrary.

    Args:
        measured: `totals` of each repeat.
        simulated: `totals` at each speed.
    """
    runs = [total.run for total in measured[0]]
    return [Order((a, b), _better(measured, a, b), _better(simulated, a, b)) for a, b in combinations(runs, 2)]


def by_repeat(rows: Rows) -> list[list[Total]]:
    """Return `totals` of each repeat that all pairs have."""
    return [
        totals({key: [found[i]] for key, found in rows.items()})
        for i in range(min(len(found) for found in rows.values()))
    ]


def window_order(rows: Rows, window: str) -> list[str]:
    """Rank the runs on one window, best first: by the medians of violations, to one point, then of quality cost."""
    found: dict[str, tuple[float, float]] = {}
    for (own, run), repeats in rows.items():
        if own != window:
            continue
        kls = [0.0 if run == STOCK else row["expected_kl_per_token"] for row in repeats]
        known = [float("inf") if kl is None else kl for kl in kls]
        rate = statistics.median(row["violation_rate"] for row in repeats)
        found[run] = (round(rate, 2), statistics.median(known))
    return sorted(found, key=lambda run: found[run])


def dominated(rows: Rows) -> list[tuple[str, str, str]]:
    """Find (window, static run, run that it dominates): at most a point more violations on average, at less cost.

    Only what morphs is looked at: that a format for good does as well says that morphing does not pay there.
    """
    found = []
    for window in dict.fromkeys(window for window, _ in rows):
        columns = by_repeat({key: repeats for key, repeats in rows.items() if key[0] == window})
        runs = [total.run for total in columns[0]]
        found += [
            (window, baseline, run)
            for baseline in runs
            for run in runs
            if baseline.startswith(STATIC)
            and not run.startswith(STATIC)
            and run != STOCK
            and _mean_rate(columns, baseline) <= _mean_rate(columns, run) + _SAME_RATE
            and _by_cost(columns, baseline, run) > 0
        ]
    return found


def _better(columns: Sequence[Sequence[Total]], a: str, b: str) -> int:
    return _by_violations(columns, a, b) or _by_cost(columns, a, b)


def _by_violations(columns: Sequence[Sequence[Total]], a: str, b: str) -> int:
    return _sign([(x.violation_rate, y.violation_rate) for x, y in _both(columns, a, b)], _SAME_RATE)


def _mean_rate(columns: Sequence[Sequence[Total]], run: str) -> float:
    return statistics.fmean(total.violation_rate for column in columns for total in column if total.run == run)


def _by_cost(columns: Sequence[Sequence[Total]], a: str, b: str) -> int:
    costs = []
    for x, y in _both(columns, a, b):
        if x.expected_kl_per_token is None or y.expected_kl_per_token is None:
            return 0
        costs.append((x.expected_kl_per_token, y.expected_kl_per_token))
    return _sign(costs, _SAME_KL * max(max(pair) for pair in costs))


def _both(columns: Sequence[Sequence[Total]], a: str, b: str) -> list[tuple[Total, Total]]:
    by_run = [{total.run: total for total in column} for column in columns]
    return [(runs[a], runs[b]) for runs in by_run]


def _sign(pairs: Sequence[tuple[float, float]], same: float) -> int:
    differences = [y - x for x, y in pairs]
    mean = statistics.fmean(differences)
    contrary = any(abs(d) > same and d * mean < 0 for d in differences)
    return 0 if contrary or abs(mean) <= same else (1 if mean > 0 else -1)
