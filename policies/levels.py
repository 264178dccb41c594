"""From what a user writes for a level to an index of the ladder."""

from __future__ import annotations

import re

from policies.config import SloConfig, ThresholdConfig
from policies.types import Ladder

ACCURATE_BITS = 8  # what mode accuracy may use: 8 bits cost every model little
_BITS = re.compile(r"([1-9][0-9]?)bit")


def resolve_level(ladder: Ladder, spec: int | str) -> int:
    """Return the index of the level that `spec` names.

    Args:
        ladder: all levels, `ladder[k].index == k`.
        spec: an index; 'deepest'; '8bit', '4bit' and the like: the deepest level with no weight in a format of fewer
            bits, whatever the formats are called here; or a format: the first level with ALL layers in that format.

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
    if bits := _BITS.fullmatch(spec):
        return _deepest_of(ladder, int(bits[1]))
    for level in ladder:
        if all(fmt == spec for fmt in level.layer_formats):
            return level.index
    whole = sorted({lv.layer_formats[0] for lv in ladder if len(set(lv.layer_formats)) == 1})
    raise ValueError(
        f"level {spec[:40]!r}: the ladder has no level of that name. Give 8bit, 4bit, deepest, a format that all "
        f"layers of a level are in ({', '.join(whole)}), or an index from 0 to {deepest}."
    )


def _deepest_of(ladder: Ladder, bits: int) -> int:
    """Return the deepest level whose formats all have so many bits; what is as it was loaded counts as enough."""
    return max(level.index for level in ladder if level.min_bits is None or level.min_bits >= bits)


def max_level_of(config: ThresholdConfig | SloConfig, ladder: Ladder) -> int:
    """Return the index of the deepest level that the section allows: its `max_level`, else what its mode allows.

    Raises:
        ValueError: `max_level` is not on the ladder.
    """
    if config.max_level is not None:
        return resolve_level(ladder, config.max_level)
    return _deepest_of(ladder, ACCURATE_BITS) if config.mode == "accuracy" else len(ladder) - 1
