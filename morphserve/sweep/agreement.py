"""How well does the simulation say what was measured? By pair of window and run, and by the ranking of the runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Rows = Mapping[tuple[str, str], Sequence[Row]]  # by window and run

SPEEDS = (0.9, 1.0, 1.1)  # of the simulated machine: times are multiplied by it
_RELATIVE = {"duration_s": 0.08, "output_tok_s": 0.08, "preemptions": 0.15}
_POINTS = 0.10  # of the violation rate
FIGURES = (*_RELATIVE, "violation_rate")


@dataclass(frozen=True, slots=True)
class Agreement:
    """One figure of one pair."""

    window: str
    run: str
    figure: str
    measured: float  # median over the repeats
    measured_span: tuple[float, float]
    simulated: float
    simulated_span: tuple[float, float]  # over SPEEDS

    @property
    def error(self) -> float:
        """Relative, but for the violation rate: its difference."""
        difference = self.simulated - self.measured
        if self.figure == "violation_rate":
            return difference
        return difference / self.measured if self.measured else (0.0 if not difference else float("inf"))

    @property
    def holds(self) -> bool:
        """Within the limit: 8 % of duration and throughput, 15 % of preemptions, 10 points of the violation rate."""
        return abs(self.error) <= _RELATIVE.get(self.figure, _POINTS)

    @property
    def explained(self) -> bool:
        """Not within it, but 10 % of machine speed move the simulation further than the error, or past it."""
        low, high = self.simulated_span
        return not self.holds and (
            high - low >= 2 * abs(self.simulated - self.measured) or low <= self.measured <= high
        )


def compare(measured: Rows, simulated: Mapping[tuple[str, str], Mapping[float, Row]]) -> list[Agreement]:
    """All figures that both have.

    Args:
        simulated: by window and run, then by speed.
    """
    found = []
    for (window, run), rows in measured.items():
        for figure in FIGURES:
            values = [row[figure] for row in rows if row[figure] is not None]
            by_speed = {speed: row[figure] for speed, row in simulated[window, run].items()}
            if not values or None in by_speed.values():
                continue
            found.append(
                Agreement(
                    window, run, figure,
                    statistics.median(values), (min(values), max(values)),
                    by_speed[1.0], (min(by_speed.values()), max(by_speed.values())),
                )
            )  # fmt: skip
    return found


@dataclass(frozen=True, slots=True)
class Total:
    """One run over all windows, as if they were one."""

    run: str
    violation_rate: float
    expected_kl_per_token: float | None  # None: not measured


def totals(rows: Rows) -> list[Total]:
    """Every run over all windows, best first: fewest violations, then least quality cost.

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
    kls = [0.0 if run == "stock" else row["expected_kl_per_token"] for row in rows]
    known = [kl for kl in kls if kl is not None]
    kl = sum(a * b for a, b in zip(known, weights, strict=True)) / sum(weights) if len(known) == len(kls) else None
    return Total(run, late / sent, kl)


def _rank(total: Total) -> tuple[float, float]:
    kl = total.expected_kl_per_token
    return (round(total.violation_rate, 2), float("inf") if kl is None else kl)
