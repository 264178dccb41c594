"""Which layer next, at which precision: the swap orders, from what each change does to the model's answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_layers.formats.halves import BASE

Unit = tuple[int, str]  # decoder layer id, half
_LEAST_KL = 1e-9  # a change that seems to help (a sum of noise) is treated as one that does nothing


@dataclass(frozen=True, slots=True)
class Change:
    """One layer, or half of one, into one format."""

    layer: int
    format: str
    half: str = ""  # empty = the whole layer

    @property
    def unit(self) -> Unit:
        """The layer or half that is changed, whatever into."""
        return self.layer, self.half


@dataclass(frozen=True, slots=True)
class Move:
    """One step of a ladder."""

    change: Change
    expected_kl: float  # nats per token of all moves up to this one
    bytes_freed: int  # by all moves up to this one


class QuadraticCost:
    """A model of KL for any set of changes: half the mean square of the sum of their slopes, and what rounding adds.

    Behind the first layer that differs, two runs in bf16 round differently, whatever else differs. See
    morphserve/tools/profile/effects.py for what a slope is.
    """

    def __init__(self, products: Mapping[Change, Mapping[Change, float]], rounding: Sequence[float] = ()) -> None:
        """Keep the prices of changes.

        Args:
            products: half the mean product of two changes' slopes.
            rounding: by layer, the KL that the rounding of its output costs between two runs; empty = none.
        """
        self._products = products
        self._rounding = [sum(rounding[layer:]) for layer in range(len(rounding) + 1)]

    @classmethod
    def of_slopes(cls, slopes: Mapping[Change, Tensor], rounding: Sequence[float] = ()) -> QuadraticCost:
        """Build the model from the slopes of every token."""
        changes = list(slopes)
        rows = torch.stack([slopes[change].double() for change in changes])
        gram = (rows @ rows.t() / (2 * rows.shape[1])).tolist()
        return cls({a: dict(zip(changes, row, strict=True)) for a, row in zip(changes, gram, strict=True)}, rounding)

    @property
    def changes(self) -> tuple[Change, ...]:
        """Changes that have a price."""
        return tuple(self._products)

    def kl(self, changes: Sequence[Change]) -> float:
        """Return the expected KL in nats per token."""
        of_changes = sum(self._products[a][b] for a in changes for b in changes)
        return of_changes + self.rounding_from(min((change.layer for change in changes), default=None))

    def rounding_from(self, layer: int | None) -> float:
        """Return what rounding costs when `layer` is the first that differs; None = none differs."""
        return 0.0 if layer is None or len(self._rounding) == 1 else self._rounding[layer]

    def product(self, a: Change, b: Change) -> float:
        """Return half the mean product of two changes' slopes."""
        return self._products[a][b]


def greedy(cost: QuadraticCost, size: Callable[[Unit, str], int]) -> list[Move]:
    """Return all moves, each the one that frees most bytes per expected KL after the ones before.

    A layer may pass through several formats, each smaller than the one before.

    Args:
        cost: of all changes to choose from.
        size: bytes of a layer or half in a format, BASE among them.
    """
    left = list(cost.changes)
    now: dict[Unit, Change] = {}
    with_now = dict.fromkeys(left, 0.0)  # sum of a change's products with all that is in `now`
    freed = 0
    first: int | None = None  # layer that differs
    kl = 0.0
    moves: list[Move] = []

    def gain(change: Change) -> int:
        current = now[change.unit].format if change.unit in now else BASE
        return size(change.unit, current) - size(change.unit, change.format)

    def after(change: Change) -> float:
        """Return the KL once `change` has taken the place of what its unit has now."""
        total = kl + 2 * with_now[change] + cost.product(change, change)
        if (old := now.get(change.unit)) is not None:
            total += cost.product(old, old) - 2 * with_now[old] - 2 * cost.product(change, old)
        earliest = change.layer if first is None else min(first, change.layer)
        return total + cost.rounding_from(earliest) - cost.rounding_from(first)

    while left := [change for change in left if gain(change) > 0]:
        change = max(left, key=lambda c: gain(c) / max(after(c) - kl, _LEAST_KL))
        freed += gain(change)
        kl = after(change)
        old = now.get(change.unit)
        for other in with_now:
            with_now[other] += cost.product(other, change) - (0.0 if old is None else cost.product(other, old))
        now[change.unit] = change
        first = change.layer if first is None else min(first, change.layer)
        moves.append(Move(change, kl, freed))
    return moves


def layer_importance_order(
    transformation: Sequence[float],
    replacement: Sequence[float],
    degradation: Callable[[tuple[int, ...], int], float],
    weights: tuple[float, float, float] = (0.25, 0.25, 0.5),
) -> list[int]:
    """Order layers by the paper's Algorithm 1: the one with the highest LIS given those already taken, L times.

    LIS_p(Q) = a1 LTS_p + a2 LRS_p + b MDS_p(Q), all of them similarities: high means safe to swap.

    Args:
        transformation: LTS by layer.
        replacement: LRS by layer.
        degradation: MDS of a layer, given the layers already taken.
        weights: a1, a2, b.
    """
    a1, a2, b = weights
    taken: list[int] = []
    left = set(range(len(transformation)))
    while left:
        score = {p: a1 * transformation[p] + a2 * replacement[p] + b * degradation(tuple(taken), p) for p in left}
        best = max(sorted(left), key=score.__getitem__)
        taken.append(best)
        left.remove(best)
    return taken
