"""What a run has found, as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morphserve.tools.tables import markdown_table

_COLUMNS = (
    "scenario", "holds", "answered", "refused", "canaries at level 0", "deepest level", "transitions",
    "level 0 after (s)", "warnings",
)  # fmt: skip


def report(document: Mapping[str, Any]) -> str:
    """Return the last line's document as Markdown: the machine, a row for each scenario, and what did not hold."""
    found = document["scenarios"]
    machine = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    lines = [f"{machine}; model {document['model']}", "", *markdown_table(_COLUMNS, [_row(each) for each in found])]
    notes = {
        "Did not hold": [f"* {each['name']}: {words}" for each in found for words in each["violations"]],
        "Warnings": [f"* {each['name']}: {words}" for each in found for words in each["warnings"]],
        "Left out": [f"* {name}: {why}" for name, why in document["skipped"].items()],
    }
    for title, rows in notes.items():
        lines += ["", f"{title}:", "", *rows] if rows else []
    return "\n".join(lines) + "\n"


def _row(found: Mapping[str, Any]) -> list[str]:
    transitions = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(found["transitions"].items()))
    return [
        f"`{found['name']}`",
        "no" if found["violations"] else "yes",
        f"{found['answered']:,} of {found['requests']:,}",
        f"{found['refused']:,}",
        f"{found['canaries_at_level_0']} of {found['canaries']}",
        str(found["deepest_level"]),
        transitions or "-",
        "-" if found["restored_s"] is None else str(found["restored_s"]),
        str(found["num_warnings"]),
    ]
