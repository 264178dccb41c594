"""The level as it really is, layer by layer: on one of the ladder, or between two, and which layers go next."""

from __future__ import annotations

from collections import Counter
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
class LayerState:
    """The formats that all ranks have switched to, as far as their answers tell.

    Attributes:
        current: deepest level whose formats all layers have at least.
        is_between: some layers have, or may have from the next step on, those of the next deeper level.
        formats: of every layer.
    """

    ladder: Ladder
    ranks: Sequence[RankBytes]
    current: int = 0
    is_between: bool = False
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

    @property
    def effective_level(self) -> int:
        """The level that tokens count for: between two levels, the deeper one."""
        return self.current + self.is_between

    def layers_by_format(self) -> dict[str, int]:
        """Return how many layers have each format, in the order of the layers."""
        return dict(Counter(self.formats))

    def next_target(self, level: int) -> int | None:
        """Return the next level on the way to `level`, a neighbour of where the layers are; None = they are there."""
        if self.is_between:
            return self.current + (level > self.current)
        if level == self.current:
            return None
        return self.current + (1 if level > self.current else -1)

    def direction(self, target: int) -> Direction:
        """Return the direction of `target`, a level as `next_target` names it."""
        return "degrade" if target > self.current else "restore"

    def blocks_with(self, layers: LayerFormats, target: int) -> int:
        """Return the KV blocks that are paid for once `layers` are switched on the way to `target`."""
        after = list(self.formats)
        for layer, fmt in layers:
            after[layer] = fmt
        base, deeper = self.ladder[0], self.ladder[max(target, self.effective_level)]
        paid = base.num_kv_blocks + paid_blocks(self.ranks, base.layer_formats, after)
        return min(paid, deeper.num_kv_blocks)

    def new_bytes(self, layers: LayerFormats) -> tuple[int, ...]:
        """Return the bytes of `layers` by rank, in the formats they get."""
        return tuple(sum(rank.layers[fmt][layer] for layer, fmt in layers) for rank in self.ranks)

    def old_bytes(self, layers: LayerFormats) -> tuple[int, ...]:
        """Return the bytes of `layers` by rank, in the formats they have."""
        return self.new_bytes(tuple((layer, self.formats[layer]) for layer, _ in layers))

    def begin_switch(self, target: int) -> None:
        """Note that layers of `target` may be in use from the next forward pass on."""
        self.is_between = self.is_between or target > self.current

    def settle(self, layers: LayerFormats, target: int) -> None:
        """Note that all ranks have switched `layers` on the way to `target`."""
        for layer, fmt in layers:
            self.formats[layer] = fmt
        deeper = max(target, self.effective_level)
        self.is_between = tuple(self.formats) != self.ladder[target].layer_formats
        self.current = deeper - 1 if self.is_between else target


class LayerPicker:
    """The choice of the next swap batch's layers: as many as the pause and the staging reserve of every rank allow.

    Pipeline stages work at the same time, so what counts is how many layers one rank switches.
    """

    def __init__(self, ranks: Sequence[RankBytes], ledgers: Ledgers, config: TransitionConfig) -> None:
        self._ranks = ranks
        self._config = config
        self._reserves = [ledger.staging_reserve_bytes for ledger in ledgers]
        self._seconds_per_layer: dict[Direction, float] = {}

    def pick(
        self, formats: Sequence[str], target: Sequence[str], direction: Direction, in_background: bool = False
    ) -> LayerFormats:
        """Choose layers to switch on the way from `formats` to `target`, at least one.

        In the background ranks prepare beside their steps: a swap batch pauses none of them, however large.

        What a layer takes beyond the budget of the level it leaves is the smaller of its two sizes: going
        down the new one is staged beside the old; going up, the KV given back has paid the difference.
        """
        differing = [layer for layer, fmt in enumerate(target) if fmt != formats[layer]]
        limit = self._config.layers_per_step if in_background else self._limit(differing, target, direction)
        layers: list[tuple[int, str]] = []
        excess, counts = [0] * len(self._ranks), [0] * len(self._ranks)
        for layer in alternate(self._ranks, differing):
            for i in stage_of(self._ranks, layer):
                sizes = self._ranks[i].layers
                excess[i] += min(sizes[target[layer]][layer], sizes[formats[layer]][layer])
                counts[i] += 1
            over = any(taken > reserve for taken, reserve in zip(excess, self._reserves, strict=True))
            if layers and (max(counts) > limit or over):
                break
            layers.append((layer, target[layer]))
        return tuple(layers)

    def learn(self, direction: Direction, layers: LayerFormats, seconds: float) -> None:
        """Remember what the slowest rank took for these layers."""
        counts = [0] * len(self._ranks)
        for layer, _ in layers:
            for i in stage_of(self._ranks, layer):
                counts[i] += 1
        cost = seconds / max(counts)
        known = self._seconds_per_layer.get(direction, cost)
        self._seconds_per_layer[direction] = known + _COST_SHARE * (cost - known)

    def _limit(self, layers: Sequence[int], target: Sequence[str], direction: Direction) -> int:
        """Return how many layers one rank may switch between two forward passes."""
        largest = max((rank.layers[target[layer]][layer] for rank in self._ranks for layer in layers), default=0)
        cost = self._seconds_per_layer.get(direction, largest * _FIRST_S_PER_BYTE)
        limit = self._config.layers_per_step
        return max(1, min(limit, int(self._config.max_pause_ms / 1000 / cost))) if cost > 0 else limit
