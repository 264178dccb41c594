"""What tests ask of a level of the ladder."""

from __future__ import annotations

from policies import BASE_FORMAT, MorphLevel


def swapped_layers(level: MorphLevel) -> tuple[int, ...]:
    """Ids of the layers that are not at full precision, ascending."""
    return tuple(layer for layer, fmt in enumerate(level.layer_formats) if fmt != BASE_FORMAT)
