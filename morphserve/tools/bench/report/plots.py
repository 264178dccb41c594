"""The timeline of a comparison: one column per run, the same axes in every column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: E402

from morphserve.tools.bench.comparison import STOCK  # noqa: E402
from morphserve.tools.bench.report.results import RunResult  # noqa: E402
from morphserve.tools.bench.report.tables import percent  # noqa: E402

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e7ec"
BLUE, LIGHT_BLUE, GREY, RED, AMBER, PURPLE = "#2563a8", "#b9d3ee", "#aab4c0", "#c8372d", "#d98613", "#7a4fa3"
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_BIN_S = 2.0
MARKS = (
    (BLUE, "o", "within SLO"),
    (AMBER, "D", "TPOT too high"),
    (RED, "o", "TTFT too high"),
    (RED, "x", "no full answer"),
)


def timeline(runs: Sequence[RunResult], path: Path) -> None:
    """Draw arrivals, queue, KV blocks, level and TTFT over time into a PNG."""
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(
            5,
            len(runs),
            figsize=(3.0 + 4.6 * len(runs), 9.6),
            sharex=True,
            sharey="row",
            squeeze=False,
            gridspec_kw={"height_ratios": [0.8, 1.15, 1.25, 0.8, 1.7], "hspace": 0.17, "wspace": 0.06},
        )
        end_s = max(_end_s(run) for run in runs)
        for column, run in enumerate(runs):
            _column(grid[:, column], run, end_s)
        labels = ("arrivals\n(req/s)", "requests", "KV blocks", "morph level", "TTFT (s)")
        for row, label in enumerate(labels):
            grid[row][0].set_ylabel(label)
        _share_scales(grid, runs)
        for row in (1, 2):
            grid[row][0].legend(loc="upper left", ncols=3, handlelength=1.4, columnspacing=1.2)
        figure.align_ylabels(list(grid[:, 0]))
        figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
        plt.close(figure)


def _column(axes: Sequence[Axes], run: RunResult, end_s: float) -> None:
    """Draw one run, from arrivals at the top to TTFT at the bottom."""
    rate = run.figures()["violation_rate"]
    color = RED if rate else MUTED
    axes[0].set_title(run.name, loc="left", fontsize=13, fontweight="bold", color=INK, pad=8)
    axes[0].set_title(f"{percent(rate)} SLO violations", loc="right", fontsize=10.5, color=color, pad=8)
    _arrivals(axes[0], run)
    _queue(axes[1], run)
    _blocks(axes[2], run)
    _level(axes[3], run, end_s)
    _ttft(axes[4], run)
    axes[4].set_xlabel("time since the start of the workload (s)")
    axes[4].set_xlim(0, end_s)


def _end_s(run: RunResult) -> float:
    ends = [o.ended_s for o in run.replayed.outcomes if o.ended_s is not None]
    watched = [s.t_s for s in run.series]
    return max([*ends, *watched, 1.0])


def _arrivals(ax: Axes, run: RunResult) -> None:
    at = [o.scheduled_s for o in run.replayed.outcomes]
    edges = np.arange(0.0, max(at) + 2 * _BIN_S, _BIN_S)
    counts, _ = np.histogram(at, edges)
    ax.bar(edges[:-1], counts / _BIN_S, width=_BIN_S * 0.86, align="edge", color=GREY)


def _queue(ax: Axes, run: RunResult) -> None:
    seen = [s for s in run.series if s.waiting is not None and s.running is not None]
    t = [s.t_s for s in seen]
    ax.fill_between(t, [s.waiting or 0 for s in seen], step="post", color=RED, alpha=0.25, linewidth=0)
    ax.step(t, [s.waiting or 0 for s in seen], where="post", color=RED, linewidth=1.4, label="waiting")
    ax.step(t, [s.running or 0 for s in seen], where="post", color=BLUE, linewidth=1.4, label="running")


def _blocks(ax: Axes, run: RunResult) -> None:
    seen = [s for s in run.series if s.blocks_published is not None]
    t = [s.t_s for s in seen]
    used = [s.blocks_used or 0 for s in seen]
    ax.fill_between(t, used, step="post", color=LIGHT_BLUE, linewidth=0, label="used")
    ax.step(t, [s.blocks_published or 0 for s in seen], where="post", color=INK, linewidth=1.6, label="published")


def _level(ax: Axes, run: RunResult, end_s: float) -> None:
    seen = [s for s in run.series if s.level is not None]
    if not seen:
        ax.axhline(0, color=PURPLE, linewidth=1.6)
        text = "full precision throughout" if run.name == STOCK else "no level reported"
        ax.text(
            end_s / 2, 0.5, text, ha="center", va="bottom", color=MUTED,
            fontsize=8.5, transform=ax.get_xaxis_transform(),
        )  # fmt: skip
        return
    t, level = [s.t_s for s in seen], [s.level or 0 for s in seen]
    ax.fill_between(t, level, step="post", color=PURPLE, alpha=0.22, linewidth=0)
    ax.step(t, level, where="post", color=PURPLE, linewidth=1.6)


def _ttft(ax: Axes, run: RunResult) -> None:
    slo = run.slo
    sent = [o for o in run.replayed.outcomes if o.sent_s is not None]
    good = [o for o in sent if slo.good(o)]
    late = [o for o in sent if o.ok and not slo.ttft_ok(o)]
    slow = [o for o in sent if o.ok and slo.ttft_ok(o) and not slo.tpot_ok(o)]
    lost = [o for o in sent if not o.ok]
    for group, (color, marker, _) in zip((good, slow, late), MARKS, strict=False):
        ax.scatter(
            [o.sent_s or 0.0 for o in group], [max(o.ttft_s, 1e-3) for o in group],
            s=22, color=color, marker=marker, edgecolors="white", linewidths=0.5, zorder=3,
        )  # fmt: skip
    ax.plot(
        [o.sent_s or 0.0 for o in lost], [0.97] * len(lost), MARKS[3][1], color=MARKS[3][0], markersize=5,
        transform=ax.get_xaxis_transform(), zorder=4,
    )  # fmt: skip
    ax.axhline(slo.ttft_s, color=RED, linewidth=1, linestyle=(0, (4, 3)))
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.annotate(
        f"SLO {slo.ttft_s:g} s", (1, slo.ttft_s), xycoords=("axes fraction", "data"), xytext=(-2, 3),
        textcoords="offset points", color=RED, fontsize=8.5, ha="right",
    )  # fmt: skip


def _share_scales(grid: np.ndarray, runs: Sequence[RunResult]) -> None:
    """Leave head room for the legends, and count in whole numbers."""
    tops = {
        1: max((max(s.waiting or 0, s.running or 0) for r in runs for s in r.series), default=1),
        2: max((s.blocks_published or 0 for r in runs for s in r.series), default=1),
    }
    for row, top in tops.items():
        grid[row][0].set_ylim(0, max(top, 1) * 1.32)
        grid[row][0].yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    deepest = max((s.level or 0 for r in runs for s in r.series), default=0)
    grid[3][0].set_ylim(-0.06 * max(deepest, 1), max(deepest, 1) * 1.15)
    grid[3][0].yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    first_tokens = [o.ttft_s for r in runs for o in r.replayed.outcomes if o.latency_s > 0]
    low = min([*first_tokens, runs[0].slo.ttft_s])
    high = max([*first_tokens, runs[0].slo.ttft_s])
    grid[4][0].set_ylim(10 ** math.floor(math.log10(max(low, 1e-3) * 0.9)), max(high, 1e-2) * 12)
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="", markersize=5, label=label)
        for color, marker, label in MARKS
    ]
    if all(o.ok for r in runs for o in r.replayed.outcomes):
        handles.pop()
    grid[4][0].legend(handles=handles, loc="upper left", ncols=2, columnspacing=1.2, handletextpad=0.2)


def distribution(runs: Sequence[RunResult], path: Path) -> None:
    """Draw the share of requests SENT that had TTFT and TPOT of at most x; unanswered ones never arrive."""
    colors = (GREY, BLUE, PURPLE, AMBER)
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.2), sharey=True, gridspec_kw={"wspace": 0.08})
        for run, color in zip(runs, colors * len(runs), strict=False):
            sent = max(1, sum(o.sent_s is not None for o in run.replayed.outcomes))
            done = [o for o in run.replayed.outcomes if o.ok]
            for ax, values in ((left, [o.ttft_s for o in done]), (right, [o.tpot_s * 1000 for o in done])):
                ordered = np.sort(values)
                ax.step(ordered, np.arange(1, len(ordered) + 1) / sent, where="post", color=color,
                        linewidth=2, label=run.name)  # fmt: skip
        slo = runs[0].slo
        left.set_xscale("log")
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for ax, limit, label in ((left, slo.ttft_s, "TTFT (s)"), (right, slo.tpot_s * 1000, "TPOT (ms)")):
            ax.axvline(limit, color=RED, linewidth=1, linestyle=(0, (4, 3)))
            ax.set_xlabel(label)
        left.set_ylabel("share of requests sent")
        left.set_ylim(0, 1.03)
        right.set_xlim(left=0)
        right.legend(loc="lower right")
        figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
        plt.close(figure)
