"""What a comparison says: one row per run, a headline, what it bought and what it cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from morphserve.tools.bench.compare import MORPHSERVE, STOCK, by_name, static_format
from morphserve.tools.bench.report.results import ROW_KEYS, RunResult
from morphserve.tools.workload import Slo, Workload

_LAG_LIMIT_MS = 100.0  # 5 % of the usual TTFT limit
_CLEARLY = 0.8  # of another's percentile: repeats of one run differ by less


@dataclass(frozen=True, slots=True)
class Summary:
    """One comparison, repeats folded into medians."""

    workload: Workload
    workload_path: str
    slo: Slo
    rows: tuple[dict[str, Any], ...]  # figures per run name, plus "repeats" and "spread"
    headline: str
    notes: tuple[str, ...]  # verdicts and warnings, most important first
    dtype: str | None = None  # of all servers; None = not known
    fit: dict[str, Any] | None = None  # how load and limits were fitted to the machine

    @property
    def remarks(self) -> list[str]:
        """What else of the set-up a reader must know, a sentence each."""
        own = [] if self.dtype is None else [f"dtype of all servers: {self.dtype}"]
        return own if self.fit is None else [*own, self.fit["sentence"]]

    def document(self, report: str) -> dict[str, Any]:
        """The one JSON document a comparison ends with."""
        return {
            "workload": self.workload_path,
            "slo": {"ttft_s": self.slo.ttft_s, "tpot_s": self.slo.tpot_s},
            "dtype": self.dtype,
            "fit": self.fit,
            "runs": [{key: row[key] for key in ROW_KEYS} for row in self.rows],
            "report": report,
        }


def summarize(workload: Workload, workload_path: str, slo: Slo, results: Sequence[RunResult]) -> Summary:
    """Fold all runs of a comparison into one summary."""
    rows = tuple(_fold([r.figures() for r in group]) for group in by_name(results).values())
    return Summary(
        workload=workload,
        workload_path=workload_path,
        slo=slo,
        rows=rows,
        headline=_simulated(results) + _headline(rows),
        notes=(*_verdicts(rows), *_warnings(rows)),
        dtype=results[0].setup.get("dtype"),
        fit=results[0].setup.get("fit"),
    )


def _simulated(results: Sequence[RunResult]) -> str:
    """So that nobody takes a simulation for a measurement."""
    return "Simulated: " if any("simulated" in result.setup for result in results) else ""


def representative(group: Sequence[RunResult]) -> RunResult:
    """The repeat that stands for all in the picture: the one with the median violation rate."""
    ordered = sorted(group, key=lambda r: r.figures()["violation_rate"] or 0.0)
    return ordered[(len(ordered) - 1) // 2]


def _fold(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median of every number, with [least, most] where there are repeats.

    Tokens by level, statuses and errors add up. "known" says in how many repeats a figure is known that others lack.
    """
    row: dict[str, Any] = {}
    spread: dict[str, list[float]] = {}
    known: dict[str, int] = {}
    for key, first in figures[0].items():
        values = [f[key] for f in figures if f[key] is not None]
        if 0 < len(values) < len(figures):
            known[key] = len(values)
        if not values:
            row[key] = None
        elif key == "level_at_end":
            row[key] = max(values)
        elif key == "transitions_by_outcome":
            row[key] = {k: _median([v.get(k, 0) for v in values]) for k in dict.fromkeys(k for v in values for k in v)}
        elif isinstance(first, int | float) and not isinstance(first, bool) or first is None:
            row[key] = _median(values) if not isinstance(values[0], dict) else _added(values)
            if len(figures) > 1 and not isinstance(values[0], dict):
                spread[key] = [min(values), max(values)]
        elif key == "dispatch_lag":
            row[key] = max(values, key=lambda lag: lag["p99_ms"] or 0.0)
        elif isinstance(first, dict):
            row[key] = _added(values)
        else:
            row[key] = first
    if row["level_at_end"]:  # in one repeat at least: it took longer than anybody watched
        row["level_zero_after_s"] = None
        known.pop("level_zero_after_s", None)
        spread.pop("level_zero_after_s", None)
    return row | {"repeats": len(figures), "spread": spread, "known": known}


def _median(values: Sequence[float]) -> float:
    middle = statistics.median(values)
    return int(middle) if all(isinstance(v, int) for v in values) and middle == int(middle) else middle


def _added(values: Sequence[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for value in values:
        for key, number in value.items():
            total[key] = total.get(key, 0) + number
    return total


def _find(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((row for row in rows if row["name"] == name), None)


def _headline(rows: Sequence[dict[str, Any]]) -> str:
    subject = _find(rows, MORPHSERVE)
    base = _find(rows, STOCK)
    if subject is None or base is None:
        return "; ".join(
            f"{row['name']}: SLO violations {percent(row['violation_rate'])}, "
            f"P95 TTFT {seconds(row['ttft_p95_s'])}"
            for row in rows
        )
    bought = (
        f"SLO violations {percent(base['violation_rate'])} → {percent(subject['violation_rate'])} "
        f"(first token late {percent(base['ttft_violation_rate'])} → {percent(subject['ttft_violation_rate'])}, "
        f"tokens slow {percent(base['tpot_violation_rate'])} → {percent(subject['tpot_violation_rate'])}); "
        f"P95 TTFT {seconds(base['ttft_p95_s'])} → {seconds(subject['ttft_p95_s'])}, "
        f"P95 TPOT {milliseconds(base['tpot_p95_ms'])} → {milliseconds(subject['tpot_p95_ms'])}"
    )
    return f"{bought}; price: {price(subject)}"


def price(row: dict[str, Any]) -> str:
    """What a run paid in quality, in words."""
    share, kl = row["share_above_level_0"], row["expected_kl_per_token"]
    if share is None:
        return "not reported by the server"
    cost = f"expected KL {kl:.3g} nats/token" if kl is not None else "expected KL not measured"
    return f"{percent(share)} of tokens at level ≥ 1, {cost}"


def _verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say so where another run is at least as good in every respect: in both limits, and in quality."""
    subject = _find(rows, MORPHSERVE)
    if subject is None or subject["violation_rate"] is None:
        return []
    notes = []
    for row in rows:
        if row["name"] == MORPHSERVE or row["violation_rate"] is None:
            continue
        kl = 0.0 if row["name"] == STOCK else row["expected_kl_per_token"]
        if row["violation_rate"] > subject["violation_rate"] or kl is None:
            continue
        if better := [*_better(subject, row)]:
            notes.append(
                f"{row['name']} has no more violations than MorphServe ({percent(row['violation_rate'])} against "
                f"{percent(subject['violation_rate'])}), yet does not dominate: MorphServe has {', '.join(better)}."
            )
            continue
        own_kl = subject["expected_kl_per_token"]
        if row["name"] == STOCK and not (subject["share_above_level_0"] or 0.0):
            notes.append("MorphServe never left full precision here and does not violate less than stock.")
        elif own_kl is not None and kl <= own_kl:
            without_policy = row["name"] == STOCK or static_format(row["name"])
            verdict = "Morphing did not pay here." if without_policy else "Its config is the better one here."
            notes.append(
                f"**{row['name']} dominates on this workload**: it has no more violations "
                f"({percent(row['violation_rate'])} against {percent(subject['violation_rate'])}) and no "
                f"more quality cost ({kl:.3g} against {own_kl:.3g} nats/token). {verdict}"
            )
    return notes


def _better(subject: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    """In which limits a run does better than one with no more violations, in words.

    Where both miss a limit, how far they miss it counts as well: all requests late by a minute, or by a second.
    """
    for limit, what, key, show in (
        ("ttft", "P95 TTFT", "ttft_p95_s", seconds), ("tpot", "P95 TPOT", "tpot_p95_ms", milliseconds),
    ):  # fmt: skip
        own, its = subject[f"{limit}_violation_rate"], other[f"{limit}_violation_rate"]
        if own < its:
            yield f"fewer beyond the {limit.upper()} limit ({percent(own)} against {percent(its)})"
        mine, theirs = subject[key], other[key]
        if its > 0 and mine is not None and theirs is not None and mine < _CLEARLY * theirs:
            yield f"{what} {show(mine)} against {show(theirs)}"


def _warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    for row in rows:
        lag = row["dispatch_lag"]["p99_ms"]
        if lag is not None and lag > _LAG_LIMIT_MS:
            notes.append(
                f"{row['name']}: the client sent late (P99 {lag:.0f} ms, limit {_LAG_LIMIT_MS:.0f}): "
                "its core was busy, and every TTFT may be too kind by that much."
            )
        failed = {k: n for k, n in row["statuses"].items() if k != "ok"}
        if failed:
            what = ", ".join(f"{n} {k}" for k, n in failed.items())
            notes.append(f"{row['name']}: not answered in full{_in_all(row)}: {what}. They count as violations.")
        if row["errors"]:
            what = ", ".join(f"{n} in {k}" for k, n in row["errors"].items())
            notes.append(f"{row['name']}: MorphServe reported errors{_in_all(row)}: {what}. See its server.log.")
        if row["level_at_end"] and not static_format(row["name"]):
            notes.append(f"{row['name']}: not back at level 0 when the run, or one of its repeats, ended.")
    return notes


def _in_all(row: dict[str, Any]) -> str:
    return f", in {row['repeats']} repeats together" if row["repeats"] > 1 else ""


def percent(value: float | None) -> str:
    """A share for people."""
    if value is None:
        return "n/a"
    points = value * 100
    return f"{points:.1f} %" if 0 < points < 9.95 else f"{points:.0f} %"


def seconds(value: float | None) -> str:
    """A time for people."""
    if value is None:
        return "n/a"
    return f"{value:.1f} s" if value >= 9.95 else f"{value:.2f} s"


def milliseconds(value: float | None) -> str:
    """A time per token for people."""
    return "n/a" if value is None else f"{value:.1f} ms" if value < 9.95 else f"{value:,.0f} ms"
