"""How well does the simulation say what was measured? Figure by figure, for each pair of window and run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from morphserve.tools.bench.report.tables import Row

Rows = Mapping[tuple[str, str], Sequence[Row]]  # by window and run
BySpeed = Mapping[tuple[str, str], Mapping[float, Row]]  # by window and run, then by speed: of a simulation

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


def compare(measured: Rows, simulated: BySpeed) -> list[Agreement]:
    """Compare all figures that both have; nothing where there is no simulation."""
    found = []
    for (window, run), rows in measured.items() if simulated else ():
        for figure in FIGURES:
            values = [row[figure] for row in rows if row[figure] is not None]
            by_speed = {speed: row[figure] for speed, row in simulated[window, run].items()}
            if not values or None in by_speed.values():
                continue
            found.append(
                Agreement(
                    window, run, figure, statistics.median(values), by_speed[1.0],
                    (min(by_speed.values()), max(by_speed.values())),
                )
            )  # fmt: skip
    return found
