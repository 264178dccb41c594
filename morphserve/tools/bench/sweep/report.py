"""What a sweep found, as Markdown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from morphserve.tools.bench.sweep.agreement import FIGURES, SPEEDS, Agreement, Row, Rows, compare
from morphserve.tools.bench.sweep.ranking import Order, by_repeat, dominated, orders, totals, window_order

_COLUMNS: tuple[tuple[str, str, float, str], ...] = (
    ("violation_rate", "violations", 100.0, "{:.0f} %"),
    ("ttft_p95_s", "P95 TTFT (s)", 1.0, "{:.2f}"),
    ("tpot_p99_ms", "P99 TPOT (ms)", 1.0, "{:.0f}"),
    ("output_tok_s", "tokens/s", 1.0, "{:.0f}"),
    ("duration_s", "duration (s)", 1.0, "{:.1f}"),
    ("preemptions", "preemptions", 1.0, "{:.0f}"),
    ("expected_kl_per_token", "KL (nats/token)", 1.0, "{:.4f}"),
    ("transitions", "transitions", 1.0, "{:.0f}"),
    ("level_zero_after_s", "level 0 after (s)", 1.0, "{:.1f}"),
)


def markdown(
    measured: Rows,
    simulated: Mapping[tuple[str, str], Mapping[float, Row]],
    title: str,
    repeated: str = "interleaved repeats",
) -> str:
    """The whole report; without simulated rows only what was measured.

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
        lines += [f"## {window}", "", *_head("run", *(title for _, title, _, _ in _COLUMNS))]
        for (own, run), repeats in rows.items():
            if own == window:
                lines.append(_line(run, *(_cell(repeats, key, scale, form) for key, _, scale, form in _COLUMNS)))
        lines.append("")
        lines += _unanswered(window, rows)
    return lines


def _unanswered(window: str, rows: Rows) -> list[str]:
    lines = []
    for (own, run), repeats in rows.items():
        counts: Counter[str] = Counter()
        for row in repeats:
            counts.update(row.get("statuses") or {})
        del counts["ok"]
        if own == window and counts:
            what = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
            lines.append(f"- {run}: not answered in full, in all repeats together: {what}. They count as violations.")
    return [*lines, ""] if lines else []


def _total_table(measured: Rows, simulated: Mapping[tuple[str, str], Mapping[float, Row]]) -> list[str]:
    real = totals(measured)
    order = [total.run for total in real]
    if not simulated:
        return [
            *_head("run", "violations", "KL (nats/token)"),
            *(_line(t.run, f"{t.violation_rate:.1%}", _kl(t.expected_kl_per_token)) for t in real),
            "",
        ]
    by_speed = {speed: totals({key: [rows[speed]] for key, rows in simulated.items()}) for speed in SPEEDS}
    said = {t.run: t for t in by_speed[1.0]}
    spans = {
        run: [next(t for t in ranked if t.run == run).violation_rate for ranked in by_speed.values()] for run in order
    }
    rows = [
        _line(
            t.run,
            f"{t.violation_rate:.1%}",
            f"{said[t.run].violation_rate:.1%} [{min(spans[t.run]):.1%}, {max(spans[t.run]):.1%}]",
            _kl(t.expected_kl_per_token),
            _kl(said[t.run].expected_kl_per_token),
        )
        for t in real
    ]
    predicted = [t.run for t in by_speed[1.0]]
    return [
        *_head("run", "violations", "simulated [+-10 % speed]", "KL (nats/token)", "simulated"),
        *rows,
        "",
        f"Best first by violations (to one point), then KL: measured {', '.join(order)}; "
        f"simulated {', '.join(predicted)}.",
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
        f"- On {window} {anchor} has no more violations than {run}, at less KL: morphing does not pay there."
        for window, anchor, run in dominated(rows)
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
    lines = ["## Simulated against measured", "", *_head("window", "run", *(name for name in FIGURES))]
    pairs = dict.fromkeys((a.window, a.run) for a in found)
    for window, run in pairs:
        own = {a.figure: a for a in found if (a.window, a.run) == (window, run)}
        lines.append(_line(window, run, *(_verdict(own.get(figure)) for figure in FIGURES)))
    lines.append("")
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


def _cell(rows: Sequence[Row], key: str, scale: float, form: str) -> str:
    values = [row[key] * scale for row in rows if row.get(key) is not None]
    if not values:
        return "-"
    middle = form.format(statistics.median(values))
    span = "" if len(values) == 1 else f" [{form.format(min(values))}, {form.format(max(values))}]"
    return f"{middle}{span}" + (f", {len(values)} of {len(rows)}" if len(values) < len(rows) else "")


def _kl(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _head(*names: Any) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _line(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
