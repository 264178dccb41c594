"""The report as one page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from morphserve.tools.bench.comparison import MORPHSERVE, STOCK
from morphserve.tools.bench.report.results import RunResult
from morphserve.tools.bench.report.summary import Summary, change, price
from morphserve.tools.bench.report.tables import milliseconds, percent, seconds

Rows = Sequence[tuple[str, list[str] | None]]

_CSS = """
:root { --ink:#1f2933; --muted:#5f6b79; --line:#e3e7ec; --paper:#ffffff; --ground:#f5f7f9; --blue:#2563a8;
  --red:#c8372d; --green:#2c7a4b; --amber:#9a5b00; }
* { box-sizing:border-box; }
body { margin:0; background:var(--ground); color:var(--ink); font:15px/1.55 system-ui, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; }
main { max-width:1280px; margin:0 auto; padding:40px 28px 64px; }
h1 { font-size:15px; font-weight:600; color:var(--muted); margin:0 0 6px; }
.headline { font-size:27px; line-height:1.3; font-weight:650; margin:0 0 22px; text-wrap:balance; }
h2 { font-size:18px; margin:40px 0 12px; }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(225px,1fr)); gap:14px; margin:0 0 8px; }
.card { background:var(--paper); border:1px solid var(--line); border-radius:10px; padding:16px 18px; }
.card h3 { margin:0 0 8px; font-size:14px; } .card .big { font-size:30px; font-weight:650; line-height:1.1;
  font-variant-numeric:tabular-nums; }
.card .big.bad { color:var(--red); } .card .big.fine { color:var(--green); }
.card .of { color:var(--muted); font-size:13px; margin-bottom:8px; }
.card p { margin:2px 0; font-size:13.5px; }
.two { display:grid; grid-template-columns:repeat(auto-fit,minmax(340px,1fr)); gap:14px; }
.box { background:var(--paper); border:1px solid var(--line); border-radius:10px; padding:6px 20px 12px; }
.box h2 { margin:14px 0 6px; font-size:16px; } ul { padding-left:20px; margin:6px 0; } li { margin:4px 0; }
.note { background:#fff8ec; border:1px solid #f0d9ae; border-radius:10px; padding:10px 18px; margin:14px 0;
  color:var(--amber); }
.note p { margin:4px 0; }
figure { margin:0; background:var(--paper); border:1px solid var(--line); border-radius:10px; padding:16px;
  overflow-x:auto; }
figure img { display:block; width:100%; height:auto; } figcaption { color:var(--muted); font-size:13.5px;
  margin-top:8px; }
.scroll { overflow-x:auto; background:var(--paper); border:1px solid var(--line); border-radius:10px; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; }
th, td { padding:6px 16px; text-align:right; border-bottom:1px solid var(--line); vertical-align:top; }
th:first-child, td:first-child { text-align:left; } thead th { border-bottom:2px solid var(--ink); }
tr.group td { font-weight:650; padding-top:16px; } tr:last-child td { border-bottom:none; }
tr.sub td:first-child { padding-left:30px; color:var(--muted); }
tr.key td { font-weight:650; }
pre { background:#eef1f5; border-radius:8px; padding:10px 14px; white-space:pre-wrap; word-break:break-all;
  font-size:12.5px; margin:6px 0 14px; }
details { margin-top:10px; } summary { cursor:pointer; font-weight:600; }
dt { font-weight:600; } dd { margin:0 0 8px; }
.muted { color:var(--muted); }
"""

_DEFINITIONS = (
    (
        "SLO violation",
        "share of the requests SENT that were not answered in full within both limits; errors, rejections "
        "(503), time-outs and requests unfinished at the cut-off are violations",
    ),
    (
        "TTFT",
        "from just before the HTTP request is sent to the first chunk of the answer: includes HTTP, "
        "queueing and prefill",
    ),
    ("TPOT", "(end-to-end latency − TTFT) / (output tokens − 1), one value per request"),
    ("ITL", "gap between two successive chunks, pooled over all requests"),
    (
        "Level 0 again after",
        "from the last moment at which requests waited, or more KV blocks were in use than level 0 has, "
        "to the return to full precision for good",
    ),
    (
        "Expected KL",
        "tokens generated at each level × that level's KL divergence against full precision as measured "
        "offline, per token",
    ),
)

# head, name of the picture, what it is for those who do not see it, what stands below it
_PICTURES = (
    (
        "What happened, second by second",
        "timeline",
        "Timeline of every run",
        "Same workload, same axes. Red: waiting requests. Black: KV blocks the scheduler may use; "
        "light blue: blocks in use. Each dot is one request, at the moment it was sent.",
    ),
    (
        "Latency of all requests",
        "distribution",
        "Distribution of TTFT and TPOT",
        "Share of requests sent that were served with at most this TTFT or TPOT. A curve that ends "
        "below 1 had requests without a full answer. Dashed: the SLO.",
    ),
)


def page(summary: Summary, table: Rows, shown: Sequence[RunResult], pictures: dict[str, Path]) -> str:
    """Return the whole page.

    Args:
        shown: one run per name, in the order of the columns.
        pictures: PNG files by name; they are put into the page.
    """
    names = [row["name"] for row in summary.rows]
    title = _text(f"{summary.workload.name}: {' vs '.join(names)}")
    body = [
        f"<h1>{title}</h1>",
        f'<p class="headline">{_text(summary.headline)}</p>',
        _cards(summary),
        _notes(summary),
        _bought_and_cost(summary),
        *(f"<h2>{head}</h2>\n{_figure(pictures[name], alt, caption)}" for head, name, alt, caption in _PICTURES),
        "<h2>All figures</h2>",
        _table(names, table, summary.rows[0]["repeats"]),
        _how(summary, shown),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_CSS}</style>\n</head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main></body>\n</html>\n"
    )


def _cards(summary: Summary) -> str:
    cards = []
    for row in summary.rows:
        rate = row["violation_rate"]
        tone = "fine" if rate is not None and rate <= 0.02 else "bad"
        cost = "full precision" if row["name"] == STOCK else price(row)
        cards.append(
            f'<div class="card"><h3>{_text(row["name"])}</h3><div class="big {tone}">{percent(rate)}</div>'
            f'<div class="of">SLO violations of {row["sent"]} requests</div>'
            f"<p>P95 TTFT <b>{seconds(row['ttft_p95_s'])}</b></p>"
            f"<p>first token late <b>{percent(row['ttft_violation_rate'])}</b>, tokens slow "
            f"<b>{percent(row['tpot_violation_rate'])}</b></p>"
            f"<p>P99 TPOT <b>{milliseconds(row['tpot_p99_ms'])}</b></p>"
            f'<p class="muted">{_text(cost)}</p></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _notes(summary: Summary) -> str:
    if not summary.notes:
        return ""
    return '<div class="note">' + "".join(f"<p>{_text(note)}</p>" for note in summary.notes) + "</div>"


def _bought_and_cost(summary: Summary) -> str:
    by = {row["name"]: row for row in summary.rows}
    base, row = by.get(STOCK), by.get(MORPHSERVE)
    if base is None or row is None:
        return ""
    bought = [
        f"{change(base, row, 'violation_rate')} ({base['sent'] - base['good']} → {row['sent'] - row['good']} requests)",
        f"{change(base, row, 'ttft_violation_rate')}, {change(base, row, 'tpot_violation_rate')}",
        change(base, row, "ttft_p95_s"),
        change(base, row, "tpot_p99_ms"),
        f"output {base['output_tok_s']:.0f} → {row['output_tok_s']:.0f} tokens per second, "
        f"{base['duration_s']:.0f} → {row['duration_s']:.0f} s for the whole workload",
        f"preemptions {_number(base['preemptions'])} → {_number(row['preemptions'])}",
    ]
    cost = [
        price(row),
        f"transitions: {_number(row['transitions'])}, longest pause {milliseconds(row['pause_max_ms'])}",
        f"full precision again {seconds(row['level_zero_after_s'])} after the pressure ended"
        if row["level_zero_after_s"] is not None
        else "return to full precision: not seen"
        if row["level_max"]
        else "never left full precision",
    ]
    boxes = (f'<div class="box"><h2>{head}</h2>{_list(items)}</div>' for head, items in (
        ("What it bought", bought), ("What it cost", cost),
    ))  # fmt: skip
    return f'<div class="two">{"".join(boxes)}</div>'


def _table(names: Sequence[str], table: Rows, repeats: int) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    rows = []
    for label, cells in table:
        if cells is None:
            rows.append(f'<tr class="group"><td colspan="{len(names) + 1}">{_text(label)}</td></tr>')
            continue
        kind = "sub" if label.startswith("…") else "key" if label.startswith("SLO") else ""
        body = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        rows.append(f'<tr class="{kind}"><td>{_text(label)}</td>{body}</tr>')
    note = f'<p class="muted">Median of {repeats} repeats, least and most in brackets.</p>' if repeats > 1 else ""
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f"</table></div>{note}"
    )


def _how(summary: Summary, shown: Sequence[RunResult]) -> str:
    w = summary.workload
    machine = shown[0].setup
    temperature = machine.get("temperature")
    answers = f"drawn at temperature {temperature:g}" if temperature else "greedy"
    facts = [
        f"{summary.workload_path}: {len(w.requests)} requests in {w.span_s:.0f} s, "
        f"{w.input_tokens:,} prompt tokens, "
        f"{w.output_tokens:,} output tokens, {answers}, sent at the trace's times whatever the server does",
        f"SLO: TTFT {summary.slo.ttft_s:g} s and TPOT {summary.slo.tpot_s * 1000:g} ms, both",
        *summary.remarks,
        f"**simulated, no server was started**: {machine['simulated']}"
        if "simulated" in machine
        else f"machine: {machine.get('cores', '?')} cores, {machine.get('cpu', 'unknown processor')}, "
        f"{machine.get('memory_gib', '?')} GiB",
        "versions: "
        + ", ".join(f"{n} {machine[n]}" for n in ("vllm", "torch", "morphserve", "python") if n in machine),
    ]
    runs = []
    for run in shown:
        runs.append(
            f"<dt>{_text(run.name)}</dt><dd class='muted'>{_circumstances(run)}</dd><pre>"
            f"{_text(str(run.setup.get('command') or run.setup.get('url', '')), code=True)}</pre>"
        )
    terms = "".join(f"<dt>{_text(term)}</dt><dd>{_text(what)}</dd>" for term, what in _DEFINITIONS)
    return (
        f"<h2>How it was {'simulated' if 'simulated' in machine else 'measured'}</h2>{_list(facts)}"
        f"<details open><summary>Runs</summary><dl>{''.join(runs)}</dl></details>"
        f"<details><summary>What the words mean</summary><dl>{terms}</dl></details>"
    )


def _circumstances(run: RunResult) -> str:
    if "simulated" in run.setup:
        return f"simulated: {run.setup['num_steps']:,} engine steps; its config:"
    lag = run.figures()["dispatch_lag"]
    return (
        f"load average before {run.setup.get('load_average_before', 0):.1f}, after "
        f"{run.setup.get('load_average_after', 0):.1f}; client sent {milliseconds(lag['p99_ms'])} late at P99"
    )


def _figure(path: Path, alt: str, caption: str) -> str:
    picture = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{_text(alt)}" src="data:image/png;base64,{picture}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in items)}</ul>"


def _text(text: str, code: bool = False) -> str:
    escaped = html.escape(text)
    return escaped if code else re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escaped)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:g}"
