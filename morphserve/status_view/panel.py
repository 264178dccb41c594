"""An engine's panel, made of its status."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from morphserve.status_view.lines import LINES, Status, is_moving, silent_s
from morphserve.status_view.parts import Bar, Change, LevelRow, Line, Panel, Tone
from morphserve.status_view.words import counts, duration

UNTOLD = "not told by this server"


def panels(document: Status) -> list[Panel]:
    """Return one panel for each engine of a `/morphserve/status` document."""
    age_s = document.get("age_s", 0.0)
    return [_panel({"age_s": age_s, **status}) for status in document.get("engines", [document])]


def _panel(status: Status) -> Panel:
    lines = tuple(line for label, say in LINES if (line := _told(label, say, status)) is not None)
    bar = _or(_kv_bar, status, Bar("KV blocks", UNTOLD, 0.0))
    tones = {line.tone for line in lines}
    return Panel(
        title=f"engine {status.get('engine', 0)}",
        summary=_or(_summary, status, UNTOLD),
        tone="bad" if "bad" in tones else "warn" if "warn" in tones else "",
        bars=(bar,),
        lines=lines,
        levels=_or(_levels, status, ()),
        changes=_or(_changes, status, ()),
    )


def _or(make: Callable[[Status], Any], status: Status, otherwise: Any) -> Any:
    try:
        return make(status)
    except (KeyError, TypeError, ValueError, AttributeError):  # a status of another version
        return otherwise


def _told(label: str, say: Callable[[Status], Line | None], status: Status) -> Line | None:
    line: Line | None = _or(say, status, Line(label, UNTOLD))
    return line


def _kv_bar(s: Status) -> Bar:
    used, usable = s["used_kv_blocks"], max(s["num_kv_blocks"] - 1, 1)  # the null block is never handed out
    behind = "" if s["mapped_kv_blocks"] == s["num_kv_blocks"] else f", {s['mapped_kv_blocks']:,} mapped"
    deepest = s["ladder"][-1]["num_kv_blocks"]
    text = f"{used:,} of {s['num_kv_blocks']:,} published in use{behind}; the deepest level has {deepest:,}"
    share = min(used / usable, 1.0)
    return Bar("KV blocks", text, share, "bad" if share > 0.95 else "warn" if share > 0.8 else "good")


def _levels(s: Status) -> tuple[LevelRow, ...]:
    marks = {s["target_level"]: "target", s["exposure_level"]: "here"}
    return tuple(
        LevelRow(
            level=str(row["level"]),
            layers=counts(row["layers_by_format"]),
            kv_blocks=f"{row['num_kv_blocks']:,}",
            kl="0" if row["level"] == 0 else "?" if row["expected_kl"] is None else f"{row['expected_kl']:.4f}",
            tokens=f"{s['tokens_by_level'][str(row['level'])]:,}",
            mark=marks.get(row["level"], ""),
        )
        for row in s["ladder"]
    )


def _changes(s: Status) -> tuple[Change, ...]:
    tones: dict[str, Tone] = {"aborted": "bad", "cancelled": "warn"}
    return tuple(
        Change(
            revision=row["revision"],
            ago=f"{duration(row['ended_ago_s'])} ago",
            move=f"{row['from_level']} -> {row['to_level']}",
            outcome=row["outcome"],
            took=f"{1e3 * row['seconds']:,.0f} ms",
            why=f"{row['reason']}; {row['error']}" if row["error"] else row["reason"],
            tone=tones.get(row["outcome"], ""),
        )
        for row in s["recent_transitions"]
    )


def _summary(s: Status) -> str:
    late, kl = s["late"]["recent"], s["quality"]["expected_kl_per_token"]
    goal = "there" if s["target_level"] == s["exposure_level"] else s["target_level"]
    way = f" -> {goal}" if is_moving(s) else ""
    parts = [
        f"level {s['exposure_level']}{way} of {s['deepest_level']}",
        f"kv {s['used_kv_blocks']:,}/{s['num_kv_blocks']:,}",
        f"run {s['num_running']:,}, wait {s['num_waiting']:,}",
        f"late {late['num_late']:,}/{late['num_judged']:,}" if late["num_judged"] else "late -",
        "kl ?" if kl is None else f"kl {kl:.4f}",
        *(["gave up"] if s["failed"] else []),
        *([f"no answer for {duration(silent_s(s))}"] if silent_s(s) else []),
    ]
    return "  ".join(parts)
