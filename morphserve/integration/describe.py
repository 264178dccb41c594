"""What a rank tells the engine once its weights are loaded. Plain values: they cross processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies.types import BASE_FORMAT


@dataclass(frozen=True, slots=True)
class RankDescription:
    """One rank's morphable layers.

    Attributes:
        rank: global rank.
        layer_bytes: format -> bytes of each decoder layer of the MODEL on this rank, 0 for the layers of
            other pipeline stages. Morphable linears only: norms and embeddings never change.
        largest_linear_bytes: of one linear at full precision.
        kernels: format -> name of the kernel that serves it here.
    """

    rank: int
    layer_bytes: dict[str, tuple[int, ...]]
    largest_linear_bytes: int
    kernels: dict[str, str]


def common_layer_bytes(ranks: Sequence[RankDescription]) -> dict[str, tuple[int, ...]]:
    """Layer sizes that hold on every rank, so that one ladder and one ledger can speak for all.

    Tensor-parallel slices are equal but for what only one rank keeps, as the bias of a row-parallel linear.
    At full precision a layer counts with its largest size; in a variant it frees no more than it frees on
    the rank where that is least. KV blocks paid for by these figures are paid for everywhere.
    """
    base = [max(sizes) for sizes in zip(*(rank.layer_bytes[BASE_FORMAT] for rank in ranks), strict=True)]
    common = {BASE_FORMAT: tuple(base)}
    for fmt in ranks[0].layer_bytes:
        freed = [
            [old - new for old, new in zip(rank.layer_bytes[BASE_FORMAT], rank.layer_bytes[fmt], strict=True)]
            for rank in ranks
        ]
        common[fmt] = tuple(size - min(least) for size, *least in zip(base, *freed, strict=True))
    return common
