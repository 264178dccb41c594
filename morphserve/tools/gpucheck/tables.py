"""The report as Markdown, and the short document of the last line of stdout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from morphserve.tools.gpucheck.results import Figure, PartResult
from morphserve.tools.tables import markdown_table

DRY_BANNER = "DRY RUN on cpu with stand-ins and tiny sizes: no figure in this report is of a GPU."
_COLUMNS = ("figure", "unit", "median", "quartiles", "p99", "least to most", "repeats")


def render(machine: dict[str, Any], results: Sequence[PartResult], dry: bool, note: str = "") -> str:
    """Return the whole report."""
    lines = ["# GPU check", ""]
    if dry:
        lines += [f"**{DRY_BANNER}**", ""]
    if note:
        lines += [note, ""]
    lines += _table(("machine", ""), [(key, _cell(value)) for key, value in machine.items()])
    lines += _table(
        ("part", "what", "status", "expectations", "s", "reason"),
        [
            (r.part, r.title, r.status + (" (dry)" if dry else ""), _expectations(r), f"{r.seconds:g}", _cell(r.reason))
            for r in results
        ],
    )
    for result in results:
        lines += _section(result, dry)
    return "\n".join(lines).rstrip() + "\n"


def summary(results: Sequence[PartResult], dry: bool, files: Sequence[str], exit_code: int) -> dict[str, Any]:
    """Status of each part and where the figures are: short enough for a log that keeps only its end."""
    parts = {}
    for r in results:
        missed = [v.name for v in r.findings.verdicts if not v.ok]
        row: dict[str, Any] = {"status": r.status, "s": r.seconds, "figures": len(r.findings.figures)}
        parts[r.part] = row | ({"reason": r.reason[:300]} if r.reason else {}) | ({"missed": missed} if missed else {})
    return {"dry_run": dry, "exit_code": exit_code, "parts": parts, "files": list(files)}


def _section(result: PartResult, dry: bool) -> list[str]:
    found = result.findings
    if not (found.figures or found.verdicts or found.notes or result.output_tail):
        return []
    lines = [f"## {result.part}: {result.title}{' (dry run, no GPU)' if dry else ''}", ""]
    if clocks := _clocks(result):
        lines += [clocks, ""]
    if found.figures:
        lines += _table(_COLUMNS, [_row(figure) for figure in found.figures])
    if found.verdicts:
        rows = [
            (v.name, "required" if v.required else "hoped for", "yes" if v.ok else "**NO**", _cell(v.detail))
            for v in found.verdicts
        ]
        lines += _table(("criterion", "kind", "holds", "detail"), rows)
    lines += [f"* {note}" if "\n" not in note else f"```text\n{note.strip()}\n```" for note in found.notes]
    if result.output_tail:
        lines += ["", "End of its output:", "", "```text", result.output_tail.strip().replace("```", "'''"), "```"]
    return [*lines, ""]


def _row(figure: Figure) -> tuple[str, ...]:
    return (
        figure.name, figure.unit, f"{figure.median:g}", f"{figure.q1:g} to {figure.q3:g}", f"{figure.p99:g}",
        f"{figure.least:g} to {figure.most:g}", str(figure.repeats),
    )  # fmt: skip


def _expectations(result: PartResult) -> str:
    hoped = [v for v in result.findings.verdicts if not v.required]
    return f"{sum(v.ok for v in hoped)} of {len(hoped)} met" if hoped else ""


def _clocks(result: PartResult) -> str:
    before, after = (result.sensors.get(when, {}) for when in ("before", "after"))
    return "; ".join(f"{key} {before[key]:g} to {after[key]:g}" for key in before if _is_number(before, after, key))


def _is_number(before: dict[str, Any], after: dict[str, Any], key: str) -> bool:
    return isinstance(before[key], int | float) and isinstance(after.get(key), int | float)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [*markdown_table(head, rows), ""] if rows else []


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
