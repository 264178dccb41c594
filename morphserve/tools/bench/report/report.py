"""The directory a comparison leaves: summary.json, summary.md, pictures, one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from morphserve.tools.bench.report import html, plots
from morphserve.tools.bench.report.results import RunResult
from morphserve.tools.bench.report.summary import Summary, by_name, representative
from morphserve.tools.bench.report.tables import Show, Words, form, percent
from morphserve.tools.tables import markdown_table


def _levels(tokens: dict[str, int]) -> str:
    total = sum(tokens.values()) or 1
    return ", ".join(f"L{level}: {percent(n / total)}" for level, n in _by_number(tokens))


def _by_number(tokens: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(tokens.items(), key=lambda item: int(item[0]) if item[0].isdigit() else 0)


def _moves(moves: dict[str, int]) -> str:
    return ", ".join(f"{n} {key.replace('/', ' ')}" for key, n in moves.items()) or "none"


_WORDS = Words(absent="–", span=" ({} – {})", part=", in {} of {}")

# label, key, format; a key of None begins a group
TABLE: tuple[tuple[str, str | None, Show], ...] = (
    ("What users got", None, str),
    ("SLO violations, of requests sent", "violation_rate", percent),
    ("… TTFT alone", "ttft_violation_rate", percent),
    ("… TPOT alone", "tpot_violation_rate", percent),
    ("TTFT P50 (s)", "ttft_p50_s", form("{:,.2f}")),
    ("TTFT P95 (s)", "ttft_p95_s", form("{:,.2f}")),
    ("TTFT P99 (s)", "ttft_p99_s", form("{:,.2f}")),
    ("TPOT P50 (ms)", "tpot_p50_ms", form("{:,.0f}")),
    ("TPOT P95 (ms)", "tpot_p95_ms", form("{:,.0f}")),
    ("TPOT P99 (ms)", "tpot_p99_ms", form("{:,.0f}")),
    ("ITL P50 (ms)", "itl_p50_ms", form("{:,.0f}")),
    ("ITL P95 (ms)", "itl_p95_ms", form("{:,.0f}")),
    ("ITL P99 (ms)", "itl_p99_ms", form("{:,.0f}")),
    ("Output tokens per second", "output_tok_s", form("{:,.0f}")),
    ("Goodput (requests per second)", "goodput_rps", form("{:,.2f}")),
    ("Duration (s)", "duration_s", form("{:,.0f}")),
    ("What the server did", None, str),
    ("Preemptions", "preemptions", form("{:,.0f}")),
    ("Longest queue", "max_waiting", form("{:,.0f}")),
    ("Most KV blocks", "kv_blocks_max", form("{:,.0f}")),
    ("Transitions", "transitions_by_outcome", _moves),
    ("Time in transitions (s)", "transition_s", form("{:,.2f}")),
    ("Longest pause by a transition (ms)", "pause_max_ms", form("{:,.1f}")),
    ("Level 0 again after the pressure ended, slowest (s)", "level_zero_after_s", form("{:,.1f}")),
    ("What it cost", None, str),
    ("Share of tokens per level", "tokens_by_level", _levels),
    ("Tokens at level 1 or deeper", "share_above_level_0", percent),
    ("Expected KL (nats per token)", "expected_kl_per_token", form("{:,.4f}")),
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
    """Return label and one cell per run; None instead of cells begins a group. Rows nobody has are left out."""
    out: list[tuple[str, list[str] | None]] = []
    for label, key, show in TABLE:
        cells = None if key is None else [_WORDS.cell(row, key, show) for row in summary.rows]
        if cells is None or any(cell != _WORDS.absent for cell in cells):
            out.append((label, cells))
    # A group without rows says nothing.
    return [r for i, r in enumerate(out) if r[1] is not None or (i + 1 < len(out) and out[i + 1][1] is not None)]


def _markdown(summary: Summary) -> str:
    names = [row["name"] for row in summary.rows]
    rows = [
        [f"**{label}**", *("" for _ in names)] if cells is None else [label, *cells]
        for label, cells in table_rows(summary)
    ]
    lines = [
        f"# {summary.workload.name}: {', '.join(names)}",
        "",
        f"**{summary.headline}**",
        "",
        *[f"- {note}" for note in summary.notes],
        *([""] if summary.notes else []),
        *markdown_table(["", *names], rows),
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
