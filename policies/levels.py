"""From what a user writes for a level to an index of the ladder."""

from __future__ import annotations

from policies.config import SloConfig, ThresholdConfig
from policies.types import BASE_FORMAT, Ladder

ACCURATE = frozenset({"w8", "fp8"})  # what mode accuracy may use: 8 bits cost every model little


def resolve_level(ladder: Ladder, spec: int | str) -> int:
    """Return the index of the level that `spec` names.

    Args:
        ladder: all levels, `ladder[k].index == k`.
        spec: an index, 'deepest', or a format: the first level with ALL layers in that format.

    Raises:
        ValueError: no such level; the message lists the ones there are.
    """
    deepest = len(ladder) - 1
    if isinstance(spec, int):
        if 0 <= spec <= deepest:
            return spec
        raise ValueError(
            f"level {spec} is not on the ladder, which has levels 0 to {deepest}. "
            "Give one of these, or add steps to `ladder`."
        )
    if spec == "deepest":
        return deepest
    for level in ladder:
        if all(fmt == spec for fmt in level.layer_formats):
            return level.index
    whole = sorted({lv.layer_formats[0] for lv in ladder if len(set(lv.layer_formats)) == 1})
    raise ValueError(
        f"level {spec!r}: no level of the ladder has all layers in that format (it has {', '.join(whole)}). "
        f"Give one of these, 'deepest', or an index from 0 to {deepest}."
    )


def max_level_of(config: ThresholdConfig | SloConfig, ladder: Ladder) -> int:
    """Return the index of the deepest level that the section allows: its `max_level`, else what its mode allows.

    Raises:
        ValueError: `max_level` is not on the ladder.
    """
    if config.max_level is not None:
        return resolve_level(ladder, config.max_level)
    if config.mode != "accuracy":
        return len(ladder) - 1
    allowed = ACCURATE | {BASE_FORMAT}
    return max(level.index for level in ladder if allowed.issuperset(level.formats))
