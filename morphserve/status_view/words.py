"""Figures as words."""

from __future__ import annotations

from collections.abc import Mapping


def duration(seconds: float) -> str:
    """Return a time that has passed, as coarse as it is long."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in numbers.items())


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"
