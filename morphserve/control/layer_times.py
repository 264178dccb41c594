"""What the levels cost in time: from measured linears of one layer to a factor for every level. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from policies import Ladder

TIMED_BATCHES = (1, 8, 32)  # sequences in a step: a lone request, a few, a burst

# By format, for each of TIMED_BATCHES: seconds that a layer's linears take, those of its attention, those of its MLP.
LayerTimes = Mapping[str, Sequence[tuple[float, float]]]


def with_time_factors(ladder: Ladder, ranks: Sequence[LayerTimes]) -> Ladder:
    """The levels with `time_factors`: of the rank that a level slows down most, since the others wait for it.

    Args:
        ladder: all levels.
        ranks: of each rank, every format of the ladder and 'base'; as it is where one was not measured.
    """
    if not ranks or not all(ranks):
        return ladder
    base = ladder[0].layer_formats

    def factor(formats: Sequence[str], batch: int) -> float:
        return round(max(_seconds(times, formats, batch) / _seconds(times, base, batch) for times in ranks), 3)

    return tuple(
        replace(level, time_factors=tuple((n, factor(level.layer_formats, i)) for i, n in enumerate(TIMED_BATCHES)))
        for level in ladder
    )


def _seconds(times: LayerTimes, layer_formats: Sequence[str], batch: int) -> float:
    """Of all layers' linears at a batch, given by its place in TIMED_BATCHES."""
    total = 0.0
    for layer_format in layer_formats:
        attention, _, mlp = layer_format.partition("/")
        total += times[attention][batch][0] + times[mlp or attention][batch][1]
    return total
