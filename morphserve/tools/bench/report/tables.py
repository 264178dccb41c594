"""Figures of runs, for people: repeats folded into one row, rows into cells, cells into tables."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # figures of a run by name; None where it has none
Show = Callable[[Any], str]


def percent(value: float | None) -> str:
    """Return a share for people."""
    if value is None:
        return "n/a"
    points = value * 100
    return f"{points:.1f} %" if 0 < points < 9.95 else f"{points:.0f} %"


def seconds(value: float | None) -> str:
    """Return a time for people."""
    if value is None:
        return "n/a"
    return f"{value:.1f} s" if value >= 9.95 else f"{value:.2f} s"


def milliseconds(value: float | None) -> str:
    """Return a time per token for people."""
    return "n/a" if value is None else f"{value:.1f} ms" if value < 9.95 else f"{value:,.0f} ms"


def form(template: str, scale: float = 1.0) -> Show:
    """Return what writes a number, multiplied by `scale`, in a format such as "{:.2f}"."""
    return lambda value: template.format(value * scale)


def fold(rows: Sequence[Row]) -> Row:
    """Return repeats as one row: medians of the numbers, sums of what is counted by kind.

    Three keys more: "repeats"; "spread" has [least, most] of the numbers, "known" in how many repeats a figure is
    known that others lack.
    """
    folded: Row = {}
    spread: dict[str, list[float]] = {}
    known: dict[str, int] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if row.get(key) is not None]
        folded[key] = _folded(key, values) if values else None
        if 0 < len(values) < len(rows):
            known[key] = len(values)
        if len(rows) > 1 and values and isinstance(values[0], int | float) and key != "level_at_end":
            spread[key] = [min(values), max(values)]
    return folded | {"repeats": len(rows), "spread": spread, "known": known}


def _folded(key: str, values: Sequence[Any]) -> Any:
    if key == "level_at_end":
        return max(values)
    if key == "dispatch_lag":
        return max(values, key=lambda lag: lag["p99_ms"] or 0.0)
    if isinstance(values[0], dict):
        together = _median if key == "transitions_by_outcome" else sum
        kinds = dict.fromkeys(kind for counts in values for kind in counts)
        return {kind: together([counts.get(kind, 0) for counts in values]) for kind in kinds}
    return _median(values) if isinstance(values[0], int | float) else values[0]


def _median(values: Sequence[float]) -> float:
    middle = statistics.median(values)
    return int(middle) if all(isinstance(v, int) for v in values) and middle == int(middle) else middle


@dataclass(frozen=True, slots=True)
class Words:
    """How a folded figure is written."""

    absent: str  # nobody knows it
    span: str  # behind it, least and most
    part: str  # behind it, in how many of all repeats it is known
    spans_one: bool = True  # also where a single repeat knows it

    def cell(self, row: Row, key: str, show: Show) -> str:
        """Write one figure of a folded row."""
        if row.get(key) is None:
            return self.absent
        text, known = show(row[key]), row["known"].get(key, row["repeats"])
        if key in row["spread"] and (known > 1 or self.spans_one):
            text += self.span.format(*map(show, row["spread"][key]))
        return text + (self.part.format(known, row["repeats"]) if key in row["known"] else "")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows that have the same keys, in the order of the first; nothing where there is none."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        if rows:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
