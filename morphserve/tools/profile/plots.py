"""Pictures of swap orders and ladders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from quant_layers import ProfileLevel  # noqa: E402


def plot_frontier(ladders: Mapping[str, Sequence[ProfileLevel]], file: Path) -> None:
    """Draw what each ladder's levels free and cost, and how fast they step where that was measured.

    Args:
        ladders: by name.
        file: PNG to write.
    """
    figure, (cost, speed) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, ladder in ladders.items():
        freed = [level.bytes_freed / 2**20 for level in ladder]
        (line,) = cost.plot(freed, [level.expected_kl for level in ladder], "--", label=f"{name}, expected")
        measured = [(f, r.measured_kl) for f, r in zip(freed, ladder, strict=True) if r.measured_kl is not None]
        if len(measured) > 1:
            cost.plot(*zip(*measured, strict=True), "o-", color=line.get_color(), label=f"{name}, measured", ms=4)
        timed = [(f, r.step_time_factor) for f, r in zip(freed, ladder, strict=True) if r.step_time_factor is not None]
        if len(timed) > 1:
            speed.plot(*zip(*timed, strict=True), "o-", color=line.get_color(), label=name, ms=4)
    cost.set(xlabel="MiB freed", ylabel="KL against full precision (nats per token)")
    cost.set_yscale("symlog", linthresh=1e-3)
    speed.set(xlabel="MiB freed", ylabel="decode step time over level 0")
    speed.axhline(1.0, color="0.8", lw=1)
    for axis in (cost, speed):
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def plot_orders(counts: Sequence[int], orders: Mapping[str, Mapping[str, Sequence[float]]], file: Path) -> None:
    """KL of the first n layers of each order, with the spread over seeds.

    Args:
        counts: the n.
        orders: by name, `kl` and `std` for each count.
        file: PNG to write.
    """
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, row in orders.items():
        axis.errorbar(counts, row["kl"], yerr=row["std"], marker="o", ms=4, capsize=3, label=name)
    axis.set(xlabel="layers swapped", ylabel="KL against full precision (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)
