"""Which layers the next chunk switches: as many as the pause and the staging reserve of every rank allow."""

from __future__ import annotations

from collections.abc import Sequence

from morphserve.config import TransitionConfig
from morphserve.control.budget import Ledgers, RankBytes, alternate, stage_of
from morphserve.control.transition import Direction

LayerFormats = tuple[tuple[int, str], ...]  # (decoder layer id, format it gets)
_COST_SHARE = 0.5  # weight of the newest measurement of seconds per layer
# Until a direction has been measured. Reading and rebuilding a layer ran at 0.6 to 1 GB/s on one core.
_FIRST_S_PER_BYTE = 1 / 0.6e9


class LayerPicker:
    """Pipeline stages work at the same time, so what counts is how many layers one rank switches."""

    def __init__(self, ranks: Sequence[RankBytes], ledgers: Ledgers, config: TransitionConfig) -> None:
        self._ranks = ranks
        self._config = config
        self._reserves = [ledger.staging_reserve_bytes for ledger in ledgers]
        self._seconds_per_layer: dict[Direction, float] = {}

    def pick(
        self, formats: Sequence[str], rung: Sequence[str], direction: Direction, in_background: bool = False
    ) -> LayerFormats:
        """Layers to switch on the way from `formats` to `rung`, at least one.

        In the background ranks prepare beside their steps: a chunk pauses none of them, however large.

        What a layer takes beyond the budget of the level it leaves is the smaller of its two sizes: going
        down the new one is staged beside the old; going up, the KV given back has paid the difference.
        """
        differing = [layer for layer, fmt in enumerate(rung) if fmt != formats[layer]]
        limit = self._config.layers_per_step if in_background else self._limit(differing, rung, direction)
        layers: list[tuple[int, str]] = []
        excess, counts = [0] * len(self._ranks), [0] * len(self._ranks)
        for layer in alternate(self._ranks, differing):
            for i in stage_of(self._ranks, layer):
                sizes = self._ranks[i].layers
                excess[i] += min(sizes[rung[layer]][layer], sizes[formats[layer]][layer])
                counts[i] += 1
            over = any(taken > reserve for taken, reserve in zip(excess, self._reserves, strict=True))
            if layers and (max(counts) > limit or over):
                break
            layers.append((layer, rung[layer]))
        return tuple(layers)

    def learn(self, direction: Direction, layers: LayerFormats, seconds: float) -> None:
        """What the slowest rank took for these layers."""
        counts = [0] * len(self._ranks)
        for layer, _ in layers:
            for i in stage_of(self._ranks, layer):
                counts[i] += 1
        cost = seconds / max(counts)
        known = self._seconds_per_layer.get(direction, cost)
        self._seconds_per_layer[direction] = known + _COST_SHARE * (cost - known)

    def _limit(self, layers: Sequence[int], rung: Sequence[str], direction: Direction) -> int:
        """Layers of one rank between two forward passes."""
        largest = max((rank.layers[rung[layer]][layer] for rank in self._ranks for layer in layers), default=0)
        cost = self._seconds_per_layer.get(direction, largest * _FIRST_S_PER_BYTE)
        limit = self._config.layers_per_step
        return max(1, min(limit, int(self._config.max_pause_ms / 1000 / cost))) if cost > 0 else limit
