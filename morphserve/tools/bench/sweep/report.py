"""What a sweep found, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from morphserve.tools.bench.report.tables import Row, Show, Words, fold, form
from morphserve.tools.bench.sweep.agreement import FIGURES, SPEEDS, Agreement, BySpeed, Rows, compare
from morphserve.tools.bench.sweep.ranking import Order, Total, by_repeat, dominated, orders, totals, window_order
from morphserve.tools.tables import markdown_table

# key, head of the column, format
_COLUMNS: tuple[tuple[str, str, Show], ...] = (
    ("violation_rate", "violations", form("{:.0f} %", 100.0)),
    ("ttft_p95_s", "P95 TTFT (s)", form("{:.2f}")),
    ("tpot_p99_ms", "P99 TPOT (ms)", form("{:.0f}")),
    ("output_tok_s", "tokens/s", form("{:.0f}")),
    ("duration_s", "duration (s)", form("{:.1f}")),
    ("preemptions", "preemptions", form("{:.0f}")),
    ("expected_kl_per_token", "KL (nats/token)", form("{:.4f}")),
    ("transitions", "transitions", form("{:.0f}")),
    ("level_zero_after_s", "level 0 after (s)", form("{:.1f}")),
)
_WORDS = Words(absent="-", span=" [{}, {}]", part=", {} of {}", spans_one=False)


def markdown(
    measured: Rows,
    simulated: BySpeed,
    title: str,
    repeated: str = "interleaved repeats",
) -> str:
    """Return the whole report; without simulated rows only what was measured.

    Args:
        repeated: what several rows of a pair are.
    """
    repeats = max(len(rows) for rows in measured.values())
    parts = [f"# {title}", "", f"Medians of {repeats} {repeated} [least, most].", ""]
    parts += _measured_tables(measured)
    parts += ["## All windows together", "", *_total_table(measured, simulated)]
    parts += _dominated(measured)
    if simulated:
        parts += _agreement(compare(measured, simulated))
    return "\n".join(parts) + "\n"


def _measured_tables(rows: Rows) -> list[str]:
    lines = []
    for window in dict.fromkeys(window for window, _ in rows):
        folded = {run: fold(repeats) for (own, run), repeats in rows.items() if own == window}
        table = [[run, *(_WORDS.cell(row, key, show) for key, _, show in _COLUMNS)] for run, row in folded.items()]
        head = ["run", *(title for _, title, _ in _COLUMNS)]
        lines += [f"## {window}", "", *markdown_table(head, table), "", *_unanswered(folded)]
    return lines


def _unanswered(folded: Mapping[str, Row]) -> list[str]:
    lines = []
    for run, row in folded.items():
        counts = {status: number for status, number in (row.get("statuses") or {}).items() if status != "ok"}
        if counts:
            what = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
            lines.append(f"- {run}: not answered in full, in all repeats together: {what}. They count as violations.")
    return [*lines, ""] if lines else []


def _total_table(measured: Rows, simulated: BySpeed) -> list[str]:
    real = totals(measured)
    if simulated:
        return _totals_beside(real, measured, simulated)
    rows = [[t.run, f"{t.violation_rate:.1%}", _kl(t.expected_kl_per_token)] for t in real]
    return [*markdown_table(("run", "violations", "KL (nats/token)"), rows), ""]


def _totals_beside(real: Sequence[Total], measured: Rows, simulated: BySpeed) -> list[str]:
    """Say of what was measured on all windows together what was simulated."""
    by_speed = {speed: totals({key: [rows[speed]] for key, rows in simulated.items()}) for speed in SPEEDS}
    said = {t.run: t for t in by_speed[1.0]}
    rows = []
    for t in real:
        rates = [
            at_speed.violation_rate for ranked in by_speed.values() for at_speed in ranked if at_speed.run == t.run
        ]
        rows.append(
            [
                t.run,
                f"{t.violation_rate:.1%}",
                f"{said[t.run].violation_rate:.1%} [{min(rates):.1%}, {max(rates):.1%}]",
                _kl(t.expected_kl_per_token),
                _kl(said[t.run].expected_kl_per_token),
            ]
        )
    return [
        *markdown_table(("run", "violations", "simulated [+-10 % speed]", "KL (nats/token)", "simulated"), rows),
        "",
        f"Best first by violations (to one point), then KL: measured {', '.join(t.run for t in real)}; "
        f"simulated {', '.join(said)}.",
        "",
        *_pairs(orders(by_repeat(measured), list(by_speed.values()))),
        "",
        *_by_window(measured, {key: [rows[1.0]] for key, rows in simulated.items()}),
        "",
    ]


def _by_window(measured: Rows, simulated: Rows) -> list[str]:
    windows = list(dict.fromkeys(window for window, _ in measured))
    found = [(window, window_order(measured, window), window_order(simulated, window)) for window in windows]
    others = [
        f"- {window}: measured {', '.join(real)}; simulated {', '.join(said)}."
        for window, real, said in found
        if real != said
    ]
    same = len(windows) - len(others)
    return [f"Window by window, by medians of the same figures: the same order on {same} of {len(windows)}.", *others]


def _dominated(rows: Rows) -> list[str]:
    lines = [
        f"- On {window} {baseline} has no more violations than {run}, at less KL: morphing does not pay there."
        for window, baseline, run in dominated(rows)
    ]
    return [*lines, ""] if lines else []


def _pairs(found: Sequence[Order]) -> list[str]:
    words = {1: "before", 0: "not to be told from", -1: "behind"}
    same = sum(order.measured == order.simulated for order in found)
    opposite = sum(order.measured * order.simulated < 0 for order in found)
    return [
        "Two runs at a time, by violations (a point or more on average, and no repeat or speed to the contrary), else "
        f"by KL (5 %): {same} of {len(found)} pairs in the same order, {opposite} the other way round.",
        *(
            f"- {order.runs[0]} is {words[order.measured]} {order.runs[1]}; simulated {words[order.simulated]} it."
            for order in found
            if order.measured != order.simulated
        ),
    ]


def _agreement(found: Sequence[Agreement]) -> list[str]:
    pairs: dict[tuple[str, str], dict[str, Agreement]] = {}
    for a in found:
        pairs.setdefault((a.window, a.run), {})[a.figure] = a
    rows = [[*pair, *(_verdict(own.get(figure)) for figure in FIGURES)] for pair, own in pairs.items()]
    lines = ["## Simulated against measured", "", *markdown_table(("window", "run", *FIGURES), rows), ""]
    for figure in FIGURES:
        of = [a for a in found if a.figure == figure]
        held = sum(a.holds for a in of)
        explained = sum(a.explained for a in of)
        lines.append(
            f"- {figure}: {held} of {len(of)} within the limit, {explained} more within what 10 % of speed move."
        )
    return [
        *lines,
        "",
        "Each cell: measured, simulated [at 0.9 to 1.1 times the step times], error; **bold** beyond the limit.",
        "",
    ]


def _verdict(a: Agreement | None) -> str:
    if a is None:
        return "-"
    percent = a.figure == "violation_rate"
    form = (lambda v: f"{v:.0%}") if percent else (lambda v: f"{v:.4g}")
    error = f"{100 * a.error:+.0f} points" if percent else f"{a.error:+.0%}"
    text = (
        f"{form(a.measured)}, {form(a.simulated)} [{form(a.simulated_span[0])}, {form(a.simulated_span[1])}], {error}"
    )
    if a.holds:
        return text
    return f"*{text}*" if a.explained else f"**{text}**"


def _kl(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
