"""The paper's figures of merit, of this tree: three modes beside stock vLLM and 4 bits for good, on real traffic.

Parts `paper` and `halves` of scripts/results.py. Servers are those of `morphserve sweep`: all are up, taking turns. The
last of the windows is the first one's requests forty times as fast: what it ends with is throughput at saturation.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from readme_figures import MORPHSERVE, fitted_words, spread

from morphserve.tools.tables import markdown_table

RUNS = {
    "stock": "stock vLLM", "accuracy": "`slo`, accuracy", "morphserve": "`slo`, default",
    "performance": "`slo`, performance", "threshold": "`threshold`, default", "w4": "W4 for good",
}  # fmt: skip
WINDOWS = ("convD",)
_SHIPPED = ("accuracy", "performance", "threshold")  # YAMLs that come along
_DRAWN = "convD"
_PATIENCE = 5.0  # times the demo's: all that came at once is to be answered
_AT_ONCE = 40.0  # times as fast: the window's 72 s within two
_HEAD = (
    "server", "late", "P95 TTFT: stock's over it", "KL", "of W4's KL avoided", "TPOT P50, P99 over stock's",
    "most KV blocks over stock's", "KV in use", "tokens/s at saturation over stock's",
)  # fmt: skip


def w4_settings() -> dict[str, Any]:
    """Return the settings of the server that has all layers in 4 bits, which cost more than a level may by default."""
    return {"version": 1, "quality": {"max_kl_per_token": 1.0}, "policy": {"kind": "static", "level": "w4"}}


def sweep_words(fit: dict[str, Any], model: str, out: Path, w4: Path) -> list[str]:
    """Return the command that measures all of it, at the load and with the limits that the demo has fitted.

    Args:
        fit: the demo's.
        model: directory.
        out: directory of the runs.
        w4: file of `w4_settings`.
    """
    saturated = f"{WINDOWS[0]}:thin={fit['thin']:g}:rate_scale={_AT_ONCE * fit['rate_scale']:g}"
    named = [word for name in _SHIPPED for word in ("--policy", f"{name}={name}")] + ["--policy", f"w4={w4}"]
    return [
        *MORPHSERVE, "sweep", "--model", model, "--config", "demo", *named, "--compare", ",".join(RUNS),
        *fitted_words(fit, WINDOWS), "--window", saturated, "--out", str(out), "--quiet",
        "--cutoff", f"{_PATIENCE * fit['cutoff_s']:g}",  # the last one wins: throughput counts whole answers alone
    ]  # fmt: skip


def modes_table(out: Path, picture: Path) -> list[str]:
    """Return the table of a sweep that has ended, ranges over windows; draw the KV cache of one of them."""
    windows = [file.parents[1] for file in sorted(out.glob("*/stock.1/result.json"))]
    found = {directory.name: _window(directory) for directory in windows}
    saturated = next(name for name in found if name not in WINDOWS)
    draw_kv({RUNS[run]: found[_DRAWN][run]["series"] for run in ("stock", "morphserve", "w4")}, picture)
    at_once = found[saturated]
    rows = [[RUNS[run], *mode_cells([found[window] for window in WINDOWS], at_once, run)] for run in RUNS]
    cut = [name for run, name in RUNS.items() if at_once[run]["completed"] < at_once[run]["num_prompts"]]
    note = f" At saturation cut off before all had their answers: {', '.join(cut)}." if cut else ""
    how = ": median [least, most]" if len(WINDOWS) > 1 else ""
    return [
        f"{' and '.join(WINDOWS)}{how}.{note}", "", *markdown_table(_HEAD, rows), "",
        f"![KV blocks over time, {_DRAWN}](img/{picture.name})",
        f"*KV blocks that a server has, and those in use, {_DRAWN}.*",
    ]  # fmt: skip


def _window(directory: Path) -> dict[str, Any]:
    files = {run: directory / f"{run}.1" / "result.json" for run in RUNS}
    return {run: json.loads(file.read_text(encoding="utf-8")) for run, file in files.items()}


def mode_cells(windows: Sequence[Mapping[str, Any]], saturated: Mapping[str, Any], run: str) -> list[str]:
    """Return a server's figures over the windows, each beside stock's (or W4's) on the same window.

    Args:
        windows: by run, what `result.json` has.
        saturated: likewise of the window that comes at once.
        run: of `RUNS`.
    """
    own, stock, w4 = ([window[name]["figures"] for window in windows] for name in (run, "stock", "w4"))
    at_once, stocks = saturated[run], saturated["stock"]
    is_whole = all(each["completed"] == each["num_prompts"] for each in (at_once, stocks))
    throughput = at_once["figures"]["output_tok_s"] / stocks["figures"]["output_tok_s"]
    in_use = [kv_in_use(window[run]["series"]) for window in windows]
    is_stock = run == "stock"
    avoided = [] if is_stock or run == "w4" else [1 - r for r in _ratios(own, w4, "expected_kl_per_token")]
    return [
        spread([f["violation_rate"] for f in own], "{:.1%}"),
        "1" if is_stock else spread(_ratios(stock, own, "ttft_p95_s"), "{:.1f}"),
        "0" if is_stock else spread([f["expected_kl_per_token"] for f in own], "{:.4f}"),
        spread(avoided, "{:.0%}"),
        ", ".join(spread(_ratios(own, stock, f"tpot_p{rank}_ms"), "{:.2f}") for rank in (50, 99)),
        spread([ratio - 1 for ratio in _ratios(own, stock, "kv_blocks_max")], "{:+.0%}"),
        spread(in_use, "{:.0%}"),
        f"{throughput:.2f}" if is_whole else "-",
    ]


def kv_in_use(series: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean share of the KV blocks that requests hold, over the seconds in which any request is there."""
    shares = [
        s["blocks_used"] / s["blocks_published"]
        for s in series
        if s.get("blocks_published") and s.get("blocks_used") is not None and (s.get("running") or s.get("waiting"))
    ]
    return statistics.fmean(shares) if shares else None


def _ratios(over: Sequence[Mapping[str, Any]], under: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [a[key] / b[key] for a, b in zip(over, under, strict=True)]


def draw_kv(series: Mapping[str, Sequence[Mapping[str, Any]]], picture: Path) -> None:
    """Draw the KV blocks that a server has, and those in use, over time; a panel a server."""
    import matplotlib  # for this alone: whoever asks for --help need not wait for it

    matplotlib.use("Agg")  # before pyplot: there may be no display
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(series), figsize=(11, 2.8), sharey=True)
    for ax, (name, seen) in zip(axes, series.items(), strict=True):
        seen = [s for s in seen if s["blocks_published"]]
        t = [s["t_s"] for s in seen]
        ax.fill_between(t, [s["blocks_used"] or 0 for s in seen], step="post", color="#b9d3ee", label="in use")
        ax.step(t, [s["blocks_published"] for s in seen], where="post", color="#1f2933", label="there")
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("s")
        ax.set_ylim(0)
    axes[0].set_ylabel("KV blocks")
    axes[-1].legend(loc="lower right", fontsize=8)
    figure.savefig(picture, dpi=110, bbox_inches="tight")
    plt.close(figure)


HALVES_HEAD = ("which half in W4", "half", "computed in W4", "KL", "+-", "ln p", "+-", "as at full precision")
_WAYS = {"full": "none", "late": "second", "early": "first", "all": "both"}


def half_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the figures of one half of the answers, of `scripts/early_late.py`."""
    figures = {"kl": "{:.4f}", "kl_error": "{:.4f}", "logprob": "{:.3f}", "logprob_error": "{:.3f}"}
    shown = [form.format(row[key]) for key, form in figures.items()]
    same = "-" if row["same"] is None else f"{row['same']:.0%}"
    return [_WAYS[row["way"]], row["half"], f"{row['in_format']:.0%}", *shown, same]


def between_cells(name: str, found: Mapping[str, Any]) -> str:
    """Say what the first half in W4 costs beyond what the second costs, of the same prompts."""
    kl, logprob = found["early_minus_late"]["kl"], found["early_minus_late"]["logprob"]
    return (
        f"{name}: first half in W4 less second half in W4, over both halves, by prompt: KL {kl[0]:+.4f} +- "
        f"{kl[1]:.4f}, ln p {logprob[0]:+.3f} +- {logprob[1]:.3f}; "
        f"{found['left_out']} tokens behind the middle are left out."
    )
