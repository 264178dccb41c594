"""Bytes of each rank, and what follows for all of them together: blocks paid for, stages in turn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from policies import BASE_FORMAT, Ladder

LayerBytes = Mapping[str, Sequence[int]]  # format -> bytes of each decoder layer on one rank
Stage = tuple[int, ...]  # indices of the ranks that hold a layer


@dataclass(frozen=True, slots=True)
class RankBytes:
    """What one rank holds. Ranks of a pipeline stage have the same layers; other stages' count 0 bytes."""

    layers: LayerBytes
    kv_block_bytes: int  # of one KV block, all of this rank's layers together
    kv_quantum: int = 1  # blocks that share memory pages, so that they can only be mapped together

    def weight(self, formats: Sequence[str]) -> int:
        """Bytes of all layers, each in the format that stands at its id."""
        return sum(self.layers[fmt][layer] for layer, fmt in enumerate(formats))


def kv_quantum(ranks: Sequence[RankBytes]) -> int:
    """The smallest number of KV blocks that is whole pages on every rank."""
    return math.lcm(*(rank.kv_quantum for rank in ranks))


def paid_blocks(ranks: Sequence[RankBytes], base: Sequence[str], formats: Sequence[str]) -> int:
    """KV blocks that every rank has freed the bytes of, once its layers are in `formats` instead of `base`.

    Whole quanta: what is freed beyond them lies idle until it adds up.
    """
    paid = min((rank.weight(base) - rank.weight(formats)) // rank.kv_block_bytes for rank in ranks)
    quantum = kv_quantum(ranks)
    return paid // quantum * quantum


def most_uneven(ranks: Sequence[RankBytes], ladder: Ladder) -> tuple[int, int, int] | None:
    """The level on which stages differ most in the blocks they pay for, by more than one layer does.

    Returns:
        Level, blocks of the scarcest and of the richest rank; None where all levels are even.
    """
    base = ladder[0].layer_formats
    paid = [
        (level.index, [(rank.weight(base) - rank.weight(level.layer_formats)) // rank.kv_block_bytes for rank in ranks])
        for level in ladder
    ]
    layer = max(max(rank.layers[BASE_FORMAT]) // rank.kv_block_bytes for rank in ranks)
    level, blocks = max(paid, key=lambda row: max(row[1]) - min(row[1]))
    return (level, min(blocks), max(blocks)) if max(blocks) - min(blocks) > layer else None


def stage_of(ranks: Sequence[RankBytes], layer: int) -> Stage:
    """The ranks that hold a layer."""
    return tuple(i for i, rank in enumerate(ranks) if rank.layers[BASE_FORMAT][layer] > 0)


def balance(ranks: Sequence[RankBytes], order: Sequence[int], formats: Sequence[str], new: str) -> list[int]:
    """`order` with the pipeline stages in turn: next comes a layer of the stage that has paid for the fewest blocks.

    Only the blocks of the scarcest stage are published; what another frees beyond them lies idle. Layers of one
    stage keep their order, so a single stage keeps all of it.

    Args:
        ranks: all of them.
        order: layer ids.
        formats: of each layer now.
        new: the format they go to.
    """
    base = [BASE_FORMAT] * len(formats)
    paid = [(rank.weight(base) - rank.weight(formats)) / rank.kv_block_bytes for rank in ranks]
    waiting: dict[Stage, list[tuple[int, int]]] = {}  # (place in `order`, layer), next one last
    for place, layer in reversed(list(enumerate(order))):
        waiting.setdefault(stage_of(ranks, layer), []).append((place, layer))
    balanced = []
    while waiting:
        stage = min(waiting, key=lambda held: (min(paid[rank] for rank in held), waiting[held][-1]))
        _, layer = waiting[stage].pop()
        if not waiting[stage]:
            del waiting[stage]
        balanced.append(layer)
        for i in stage:
            freed = ranks[i].layers[formats[layer]][layer] - ranks[i].layers[new][layer]
            paid[i] += freed / ranks[i].kv_block_bytes
    return balanced


def alternate(ranks: Sequence[RankBytes], layers: Sequence[int]) -> list[int]:
    """`layers` with the pipeline stages in turn, one each: a chunk of them costs every stage about the same time."""
    seen: dict[Stage, int] = {}
    turns = []
    for place, layer in enumerate(layers):
        stage = stage_of(ranks, layer)
        turns.append((seen.get(stage, 0), place, layer))
        seen[stage] = seen.get(stage, 0) + 1
    return [layer for _, _, layer in sorted(turns)]
