"""The directory a comparison leaves: summary.json, summary.md, pictures, one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from morphserve.tools.bench.compare import by_name
from morphserve.tools.bench.report import html, plots
from morphserve.tools.bench.report.results import RunResult
from morphserve.tools.bench.report.summary import Summary, percent, representative

Format = Callable[[Any], str]


def _fixed(digits: int, scale: float = 1.0) -> Format:
    return lambda value: f"{value * scale:,.{digits}f}"


def _levels(tokens: dict[str, int]) -> str:
    total = sum(tokens.values()) or 1
    return ", ".join(f"L{level}: {percent(n / total)}" for level, n in _by_number(tokens))


def _by_number(tokens: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(tokens.items(), key=lambda item: int(item[0]) if item[0].isdigit() else 0)


def _moves(moves: dict[str, int]) -> str:
    return ", ".join(f"{n} {key.replace('/', ' ')}" for key, n in moves.items()) or "none"


# label, key, format; a key of None begins a group
TABLE: tuple[tuple[str, str | None, Format], ...] = (
    ("What users got", None, str),
    ("SLO violations, of requests sent", "violation_rate", percent),
    ("… TTFT alone", "ttft_violation_rate", percent),
    ("… TPOT alone", "tpot_violation_rate", percent),
    ("TTFT P50 (s)", "ttft_p50_s", _fixed(2)),
    ("TTFT P95 (s)", "ttft_p95_s", _fixed(2)),
    ("TTFT P99 (s)", "ttft_p99_s", _fixed(2)),
    ("TPOT P50 (ms)", "tpot_p50_ms", _fixed(0)),
    ("TPOT P95 (ms)", "tpot_p95_ms", _fixed(0)),
    ("TPOT P99 (ms)", "tpot_p99_ms", _fixed(0)),
    ("ITL P50 (ms)", "itl_p50_ms", _fixed(0)),
    ("ITL P95 (ms)", "itl_p95_ms", _fixed(0)),
    ("ITL P99 (ms)", "itl_p99_ms", _fixed(0)),
    ("Output tokens per second", "output_tok_s", _fixed(0)),
    ("Goodput (requests per second)", "goodput_rps", _fixed(2)),
    ("Duration (s)", "duration_s", _fixed(0)),
    ("What the server did", None, str),
    ("Preemptions", "preemptions", _fixed(0)),
    ("Longest queue", "max_waiting", _fixed(0)),
    ("Most KV blocks", "kv_blocks_max", _fixed(0)),
    ("Transitions", "transitions_by_outcome", _moves),
    ("Time in transitions (s)", "transition_s", _fixed(2)),
    ("Longest pause by a transition (ms)", "pause_max_ms", _fixed(1)),
    ("Level 0 again after the pressure ended, slowest (s)", "level_zero_after_s", _fixed(1)),
    ("What it cost", None, str),
    ("Share of tokens per level", "tokens_by_level", _levels),
    ("Tokens at level 1 or deeper", "share_above_level_0", percent),
    ("Expected KL (nats per token)", "expected_kl_per_token", _fixed(4)),
)


def write_report(summary: Summary, results: Sequence[RunResult], out: Path) -> Path:
    """Write everything and return the path of the page."""
    out.mkdir(parents=True, exist_ok=True)
    shown = [representative(group) for group in by_name(results).values()]
    pictures = {"timeline": out / "timeline.png", "distribution": out / "distribution.png"}
    plots.timeline(shown, pictures["timeline"])
    plots.distribution(shown, pictures["distribution"])
    page = out / "report.html"
    document = summary.document(str(page))
    (out / "summary.json").write_text(
        json.dumps(
            document
            | {
                "headline": summary.headline,
                "notes": summary.notes,
                "figures": summary.rows,
                "result_files": [str((r.directory / "result.json").relative_to(out)) for r in results],
            },
            indent=2,
            allow_nan=False,
        )
        + "\n",
        encoding="utf-8",
    )
    (out / "summary.md").write_text(_markdown(summary), encoding="utf-8")
    page.write_text(html.page(summary, table_rows(summary), shown, pictures), encoding="utf-8")
    return page


def table_rows(summary: Summary) -> list[tuple[str, list[str] | None]]:
    """Label and one cell per run; None instead of cells begins a group. Rows nobody has are left out."""
    out: list[tuple[str, list[str] | None]] = []
    for label, key, show in TABLE:
        if key is None:
            out.append((label, None))
            continue
        cells = [_cell(row, key, show) for row in summary.rows]
        if any(cell != "–" for cell in cells):
            out.append((label, cells))
    # A group without rows says nothing.
    return [
        r for i, r in enumerate(out) if r[1] is not None or (i + 1 < len(out) and out[i + 1][1] is not None)
    ]


def _cell(row: dict[str, Any], key: str, show: Format) -> str:
    value = row[key]
    if value is None:
        return "–"
    text = show(value)
    if key in row["spread"]:
        low, high = row["spread"][key]
        text += f" ({show(low)} – {show(high)})"
    if key in row["known"]:
        text += f", in {row['known'][key]} of {row['repeats']}"
    return text


def _markdown(summary: Summary) -> str:
    names = [row["name"] for row in summary.rows]
    lines = [
        f"# {summary.workload.name}: {', '.join(names)}",
        "",
        f"**{summary.headline}**",
        "",
        *[f"- {note}" for note in summary.notes],
        *([""] if summary.notes else []),
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for label, cells in table_rows(summary):
        if cells is None:
            lines.append(f"| **{label}** |" + " |" * len(names))
        else:
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Workload `{summary.workload_path}`: {len(summary.workload.requests)} requests in "
        f"{summary.workload.span_s:.0f} s. SLO: TTFT {summary.slo.ttft_s:g} s and TPOT "
        f"{summary.slo.tpot_s * 1000:g} ms, both. "
        + ("Median of repeats, least and most in brackets." if summary.rows[0]["repeats"] > 1 else ""),
        *[f"\n{remark}." for remark in summary.remarks],
        "",
        "![timeline](timeline.png)",
    ]
    return "\n".join(lines) + "\n"
