"""The level as it really is, layer by layer: on a rung of the ladder, or between two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from morphserve.control.budget import RankBytes, paid_blocks
from morphserve.control.picking import LayerFormats
from morphserve.control.transition import Direction
from morphserve.errors import ConfigError
from policies import Ladder


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
