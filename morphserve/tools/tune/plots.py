"""Pictures of a study: violations against quality cost, and what decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

from morphserve.tools.tune.baselines import CURRENT, STOCK  # noqa: E402
from morphserve.tools.tune.results import Results  # noqa: E402
from morphserve.tools.tune.score import Score  # noqa: E402

_INK, _MUTED, _GRID = "#1f2933", "#6b7785", "#e3e7ec"
_BLUE, _GREY, _RED, _AMBER, _PURPLE = "#2563a8", "#aab4c0", "#c8372d", "#d98613", "#7a4fa3"
_STYLE: Any = {
    "font.size": 9.5, "text.color": _INK, "axes.edgecolor": _GREY, "axes.labelcolor": _MUTED, "xtick.color": _MUTED,
    "ytick.color": _MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": _GRID, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8.5,
}  # fmt: skip


def draw_pareto(results: Results, path: Path) -> None:
    """Draw dev windows left, held-out windows right, on the same axes."""
    groups = [(False, "dev windows")] + ([(True, "held-out windows")] if len(results.world.held_out) else [])
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(
            1, len(groups), figsize=(1.2 + 5.2 * len(groups), 4.8), sharex=True, sharey=True, squeeze=False
        )
        for axes, (held_out, title) in zip(grid[0], groups, strict=True):
            _panel(axes, results, held_out)
            axes.set_title(title, loc="left", fontweight="bold", color=_INK)
            axes.set_xlabel("SLO violations (% of requests sent)")
        grid[0][0].set_ylabel("expected KL (nats per token)")
        _scale(grid[0][0], results)
        grid[0][0].legend(loc="upper right")
        figure.text(0.995, 0.005, "simulated", ha="right", va="bottom", color=_MUTED, fontsize=8)
        figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white", metadata={"Software": None})
        plt.close(figure)


def _panel(axes: Axes, results: Results, held_out: bool) -> None:
    if not held_out:
        complete = [t.values for t in results.trials if t.state is TrialState.COMPLETE]
        axes.scatter(
            [100 * v[0] for v in complete], [v[1] for v in complete], s=10, color=_GREY, alpha=0.6, label="trials"
        )
    front = [s for c in results.front if (s := c.held_out if held_out else c.dev) is not None]
    # On held-out windows the policies of the front need not be one: no line through them.
    axes.plot(*_points(front), "o" if held_out else "o-", color=_BLUE, markersize=4, linewidth=1, label="dev front")
    limits: dict[Score, list[str]] = {}  # one policy may be the cheapest within several
    for p in results.best:
        score = None if p.candidate is None else p.candidate.held_out if held_out else p.candidate.dev
        if score is not None:
            limits.setdefault(score, []).append(f"{p.limit * 100:g}")
    for score, within in limits.items():
        axes.plot(*_points([score]), "o", color=_BLUE, markersize=10, fillstyle="none")
        _label(axes, score, f"best ≤ {', '.join(within)} %", _BLUE, -11)
    for baseline in results.baselines:
        score = baseline.scores.on_held_out if held_out else baseline.scores.on_dev
        if score is None:
            continue
        marker, color = {STOCK: ("s", _INK), CURRENT: ("*", _AMBER)}.get(baseline.name, ("D", _RED))
        axes.plot(*_points([score]), marker, color=color, markersize=11 if marker == "*" else 6, zorder=4)
        _label(axes, score, baseline.name, color, 7)


def _points(scores: Sequence[Score]) -> tuple[list[float], list[float]]:
    return [100 * s.violations for s in scores], [s.cost for s in scores]


def _label(axes: Axes, score: Score, text: str, color: str, above: float) -> None:
    at = (100 * score.violations, score.cost)
    axes.annotate(text, at, xytext=(7, above), textcoords="offset points", color=color, fontsize=8.5, va="center")


def _scale(axes: Axes, results: Results) -> None:
    """Scale costs linearly below the cheapest policies, else logarithmically: W4 costs ten times W8, stock 0."""
    scores = [s for b in results.baselines for s in (b.scores.on_dev, b.scores.on_held_out) if s is not None]
    costs = sorted(c for c in [*(s.cost for s in scores), *(c.dev.cost for c in results.front)] if c > 0)
    if costs and costs[-1] / costs[0] > 10:
        threshold = 10 ** math.floor(math.log10(costs[len(costs) // 2]))
        axes.set_yscale("symlog", linthresh=threshold)
    axes.set_ylim(bottom=-0.03 * (costs[0] if costs else 1.0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_importance(importances: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw bars by parameter, one panel an objective."""
    keys = sorted(
        {key for shares in importances.values() for key in shares},
        key=lambda key: (max(shares.get(key, 0.0) for shares in importances.values()), key),
    )
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(
            1, len(importances), figsize=(2.2 + 3.4 * len(importances), 1.1 + 0.34 * len(keys)), sharey=True,
            squeeze=False,
        )  # fmt: skip
        for axes, (name, shares) in zip(grid[0], importances.items(), strict=True):
            axes.barh(keys, [shares.get(key, 0.0) for key in keys], color=_PURPLE, height=0.6)
            axes.set_title(name, loc="left", fontweight="bold", color=_INK)
            axes.set_xlim(0, 1)
            axes.set_xlabel("share")
        figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white", metadata={"Software": None})
        plt.close(figure)
