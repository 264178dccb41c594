"""The level as it really is, layer by layer: on a rung of the ladder or between two, and which layers go next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from morphserve.config import TransitionConfig
from morphserve.control.budget import Ledgers, RankBytes, alternate, paid_blocks, stage_of
from morphserve.control.ranks import LayerFormats
from morphserve.control.transition import Direction
from morphserve.errors import ConfigError
from policies import Ladder

_COST_SHARE = 0.5  # weight of the newest measurement of seconds per layer
# Until a direction has been measured. Reading and rebuilding a layer ran at 0.6 to 1 GB/s on one core.
_FIRST_S_PER_BYTE = 1 / 0.6e9


@dataclass(slots=True)
class Standing:
    """What all ranks have switched to, as far as their answers tell.

    Attributes:
        lower: deepest level whose formats all layers have at least.
        upper: the level to count tokens at: == lower on a rung, else the rung below.
        formats: of every layer.
    """

    ladder: Ladder
    ranks: Sequence[RankBytes]
    lower: int = 0
    upper: int = 0
    formats: list[str] = field(init=False)

    def __post_init__(self) -> None:
        for level in self.ladder:
            found = max(rank.weight(level.layer_formats) for rank in self.ranks)
            if found != level.weight_bytes:
                raise ConfigError(
                    f"level {level.index} has weight_bytes {level.weight_bytes}, its layers sum to {found}. "
                    "Build the ladder from the same bytes."
                )
        self.formats = list(self.ladder[0].layer_formats)

    def next_rung(self, target: int) -> int | None:
        """The rung to approach on the way to `target`; None = we are there."""
        if self.lower != self.upper:
            return self.upper if target >= self.upper else self.lower
        if target == self.lower:
            return None
        return self.lower + (1 if target > self.lower else -1)

    def direction(self, rung: int) -> Direction:
        """Of the way to `rung`, a neighbour as `next_rung` names it."""
        return "degrade" if rung > self.lower else "restore"

    def blocks_with(self, layers: LayerFormats, rung: int) -> int:
        """KV blocks that are paid for once `layers` are switched on the way to `rung`."""
        after = list(self.formats)
        for layer, fmt in layers:
            after[layer] = fmt
        base, deeper = self.ladder[0], self.ladder[max(rung, self.upper)]
        paid = base.num_kv_blocks + paid_blocks(self.ranks, base.layer_formats, after)
        return min(paid, deeper.num_kv_blocks)

    def new_bytes(self, layers: LayerFormats) -> tuple[int, ...]:
        """Of `layers`, in the formats they get, by rank."""
        return tuple(sum(rank.layers[fmt][layer] for layer, fmt in layers) for rank in self.ranks)

    def old_bytes(self, layers: LayerFormats) -> tuple[int, ...]:
        """Of `layers`, in the formats they have, by rank."""
        return self.new_bytes(tuple((layer, self.formats[layer]) for layer, _ in layers))

    def expose(self, rung: int) -> None:
        """Layers of `rung` may be in use from the next forward pass on."""
        self.upper = max(self.upper, rung)

    def settle(self, layers: LayerFormats, rung: int) -> None:
        """All ranks have switched `layers` on the way to `rung`."""
        for layer, fmt in layers:
            self.formats[layer] = fmt
        deeper = max(rung, self.upper)
        if tuple(self.formats) == self.ladder[rung].layer_formats:
            self.lower = self.upper = rung
        else:
            self.lower, self.upper = deeper - 1, deeper


class LayerPicker:
    """Chooses the layers of the next chunk: as many as the pause and the staging reserve of every rank allow.

    Pipeline stages work at the same time, so what counts is how many layers one rank switches.
    """

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
