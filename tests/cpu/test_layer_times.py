"""From seconds of one layer's linears to a factor for every level."""

from __future__ import annotations

import pytest

from morphserve.config import LadderConfig
from morphserve.control.budget import RankBytes
from morphserve.control.ladder import TIMED_BATCHES, LayerTimes, build_ladder, with_time_factors
from policies import Ladder, MorphLevel

pytestmark = pytest.mark.cpu

STEPS = [{"format": fmt, "layers_per_level": 2} for fmt in ("w8", "w4")]
LADDER = build_ladder(
    2, [RankBytes({"base": [9, 9], "w8": [5, 5], "w4": [3, 3]}, 1)], LadderConfig.model_validate({"steps": STEPS}), 10
)


def times(w8: float, w4: float) -> LayerTimes:
    """Attention takes 1 ms and the MLP 3 ms at level 0; the other formats so many times as long, W4 only from 8 on."""
    rows = {"base": (1.0, 1.0, 1.0), "w8": (w8, w8, w8), "w4": (1.0, w4, w4)}
    return {fmt: tuple((1e-3 * x, 3e-3 * x) for x in row) for fmt, row in rows.items()}


def factors(ladder: Ladder) -> list[tuple[float, ...]]:
    assert all(tuple(batch for batch, _ in level.time_factors) == TIMED_BATCHES for level in ladder)
    return [tuple(factor for _, factor in level.time_factors) for level in ladder]


def test_each_level_takes_what_its_layers_take() -> None:
    """Guards: a factor of another format, of another batch, or of one layer where the level has several."""
    found = with_time_factors(LADDER, [times(0.5, 1.5)])
    assert factors(found) == [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (1.0, 1.5, 1.5)]
    assert [level.layer_formats for level in found] == [level.layer_formats for level in LADDER]
    halves = (MorphLevel(0, ("base", "base"), 9, 9), MorphLevel(1, ("w8/w4", "base"), 9, 9))
    assert factors(with_time_factors(halves, [times(0.5, 2.0)]))[1] == (0.938, 1.312, 1.312)


def test_all_wait_for_the_slowest_rank() -> None:
    """Guards: the figures of rank 0, or a mean, where another rank's kernels are slower."""
    assert factors(with_time_factors(LADDER, [times(0.5, 1.2), times(0.8, 1.1)]))[1:] == [
        (0.8, 0.8, 0.8),
        (1.0, 1.2, 1.2),
    ]


def test_unmeasured_ranks_leave_the_ladder_as_it_is() -> None:
    """Guards: a start that fails on a device whose layers nobody has timed."""
    assert with_time_factors(LADDER, [{}]) == LADDER == with_time_factors(LADDER, [times(1, 1), {}])
