"""What a part found: figures with their spread, verdicts, notes. Plain values that go through JSON and back."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from morphserve.files import write_whole

Status = Literal["ok", "failed", "skipped", "no time"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity. With few repeats p99 is close to `most`: `repeats` says so."""

    name: str
    unit: str
    repeats: int
    median: float
    q1: float
    q3: float
    p99: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Something that was to hold."""

    name: str
    ok: bool
    detail: str
    required: bool  # if not, it is what the design hopes for: missing it fails nothing, and is shown


@dataclass(slots=True)
class Findings:
    """All that a part reports, as far as it got. A process that dies leaves what it had written by then."""

    figures: list[Figure] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)  # what only the part's process knows of the machine
    skipped: str = ""  # why the part did not run
    error: str = ""  # what ended it early
    out_of_time: str = ""  # what it still waited for
    finished: bool = False


@dataclass(frozen=True, slots=True)
class PartResult:
    """One row of the report."""

    part: str
    title: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    limit_s: float = 0.0
    sensors: dict[str, dict[str, Any]] = field(default_factory=dict)  # "before" and "after": clocks, temperature, power
    findings: Findings = field(default_factory=Findings)
    output_tail: str = ""  # of a part that failed


def summarize(name: str, unit: str, values: Sequence[float]) -> Figure:
    """Quartiles and p99 by linear interpolation between the samples.

    Raises:
        ValueError: no value, or one that is not finite: that is a failed measurement, not a figure.
    """
    samples = sorted(float(value) for value in values)
    if not samples or not all(math.isfinite(value) for value in samples):
        raise ValueError(f"{name}: {len(samples)} samples, {samples[:3]}...; a figure needs at least 1, all finite.")
    return Figure(
        name, unit, len(samples),
        median=_rounded(statistics.median(samples)),
        q1=_rounded(_quantile(samples, 0.25)),
        q3=_rounded(_quantile(samples, 0.75)),
        p99=_rounded(_quantile(samples, 0.99)),
        least=_rounded(samples[0]),
        most=_rounded(samples[-1]),
    )  # fmt: skip


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _rounded(value: float) -> float:
    """Six significant digits: what is measured here is not known better."""
    return float(f"{value:.6g}")


def read_findings(file: Path) -> Findings | None:
    """Return what a part's process wrote last, or None if it wrote nothing."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Findings(
        **raw
        | {
            "figures": [Figure(**row) for row in raw["figures"]],
            "verdicts": [Verdict(**row) for row in raw["verdicts"]],
        }
    )


def write_findings(file: Path, findings: Findings) -> None:
    """Replace the file as a whole."""
    write_whole(file, json.dumps(asdict(findings)))
