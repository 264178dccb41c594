"""What a comparison says: one row per run, a headline, what it bought and what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from morphserve.tools.bench.comparison import MORPHSERVE, STOCK, static_format
from morphserve.tools.bench.report.results import ROW_KEYS, RunResult
from morphserve.tools.bench.report.tables import Row, Show, fold, milliseconds, percent, seconds
from morphserve.tools.workload import Slo, Workload

_LAG_LIMIT_MS = 100.0  # 5 % of the usual TTFT limit
_CLEARLY = 0.8  # of another's percentile: repeats of one run differ by less


@dataclass(frozen=True, slots=True)
class Summary:
    """One comparison, repeats folded into medians."""

    workload: Workload
    workload_path: str
    slo: Slo
    rows: tuple[Row, ...]  # figures per run name, plus "repeats" and "spread"
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
        """Return the one JSON document that a comparison ends with."""
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
    rows = tuple(_row(group) for group in by_name(results).values())
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
    """Mark a simulation, so that nobody takes it for a measurement."""
    return "Simulated: " if any("simulated" in result.setup for result in results) else ""


def by_name(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Return the repeats of each run, in the order of their first appearance."""
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(result.name, []).append(result)
    return groups


def representative(group: Sequence[RunResult]) -> RunResult:
    """Return the repeat that stands for all in the picture: the one with the median violation rate."""
    ordered = sorted(group, key=lambda r: r.figures()["violation_rate"] or 0.0)
    return ordered[(len(ordered) - 1) // 2]


def _row(group: Sequence[RunResult]) -> Row:
    row = fold([result.figures() for result in group])
    if row["level_at_end"]:  # in one repeat at least: it took longer than anybody watched
        row["level_zero_after_s"] = None
        row["known"].pop("level_zero_after_s", None)
        row["spread"].pop("level_zero_after_s", None)
    return row


def _find(rows: Sequence[Row], name: str) -> Row | None:
    return next((row for row in rows if row["name"] == name), None)


def _headline(rows: Sequence[Row]) -> str:
    subject = _find(rows, MORPHSERVE)
    base = _find(rows, STOCK)
    if subject is None or base is None:
        return "; ".join(
            f"{row['name']}: SLO violations {percent(row['violation_rate'])}, P95 TTFT {seconds(row['ttft_p95_s'])}"
            for row in rows
        )
    violations, late, slow, ttft, tpot = (
        change(base, subject, key)
        for key in ("violation_rate", "ttft_violation_rate", "tpot_violation_rate", "ttft_p95_s", "tpot_p95_ms")
    )
    return f"{violations} ({late}, {slow}); {ttft}, {tpot}; price: {price(subject)}"


_CHANGES: dict[str, tuple[str, Show]] = {
    "violation_rate": ("SLO violations", percent),
    "ttft_violation_rate": ("first token late", percent),
    "tpot_violation_rate": ("tokens slow", percent),
    "ttft_p95_s": ("P95 TTFT", seconds),
    "tpot_p95_ms": ("P95 TPOT", milliseconds),
    "tpot_p99_ms": ("P99 TPOT", milliseconds),
}


def change(base: Row, subject: Row, key: str) -> str:
    """Return what became of a figure, in words."""
    words, show = _CHANGES[key]
    return f"{words} {show(base[key])} → {show(subject[key])}"


def price(row: Row) -> str:
    """Say what a run paid in quality."""
    share, kl = row["share_above_level_0"], row["expected_kl_per_token"]
    if share is None:
        return "not reported by the server"
    cost = f"expected KL {kl:.3g} nats/token" if kl is not None else "expected KL not measured"
    return f"{percent(share)} of tokens at level ≥ 1, {cost}"


def _verdicts(rows: Sequence[Row]) -> list[str]:
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


def _better(subject: Row, other: Row) -> Iterator[str]:
    """Say in which limits a run does better than one with no more violations.

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


def _warnings(rows: Sequence[Row]) -> list[str]:
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


def _in_all(row: Row) -> str:
    return f", in {row['repeats']} repeats together" if row["repeats"] > 1 else ""
