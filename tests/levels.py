"""What tests ask of a level of the ladder."""

from __future__ import annotations

from morphserve.config import LadderConfig, LadderStep
from policies import BASE_FORMAT, MorphLevel

# All layers in 8 bits, then all in 4, front to back: for who asks about policies and bytes, not about the default.
W8_THEN_W4 = LadderConfig(
    order="front_to_back", steps=[LadderStep(format=fmt, optional=True) for fmt in ("w8", "w4")]
)


def swapped_layers(level: MorphLevel) -> tuple[int, ...]:
    """Ids of the layers that are not at full precision, ascending."""
    return tuple(layer for layer, fmt in enumerate(level.layer_formats) if fmt != BASE_FORMAT)
