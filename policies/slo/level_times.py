"""How long a step of each level takes: as calibration measured it, or learned from the engine's own steps."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log
from typing import Protocol

from policies.step_times import LayerMove, StepTime
from policies.types import Ladder, MorphLevel, StepLoad

# What a step of level 0 is made of, as shares of the step of a lone sequence: what no format changes (Python, sampling,
# the head), the decoder layers' linears; for each sequence both again; a prompt token in the linears; a token of KV. Between what a small model shows on two CPU cores (.05 a sequence, 3e-4 a token of KV) and a large one on a GPU
# (.003, 5e-6): steps correct all six within seconds, and until then thresholds decide.
_PRIOR = (0.3, 0.7, 0.005, 0.01, 0.015, 4e-5)
_UNIT_S = 0.02  # a lone sequence's step, until the first has been seen
_STEPS_TO_SETTLE = 32  # and so many steps until predictions are made
_MEMORY_S = 300.0  # time constant of what is learned, in seconds of measured steps
_PRIOR_STEPS = 0.5  # that the prior counts as, in each of its parts
_LEAST = 0.05  # of a part's prior: none vanishes
_OUTLIER = 2.0  # a step so many times off its prediction is a stall of the machine
_REFIT_STEPS = 500  # at least so often; earlier each time that the steps have doubled
_SWEEPS = 60
_COPY_BYTES_PER_S = 1.7e9  # of a layer that degrades; one that restores is read anew, at half of it


class LevelTimes(Protocol):
    """Step times by level, and the time that a layer takes to switch."""

    move: LayerMove

    def __len__(self) -> int: ...

    def __getitem__(self, level: int) -> StepTime: ...

    @property
    def is_settled(self) -> bool:
        """Whether predictions may be made of them."""
        ...

    def learn(self, step: StepLoad) -> float:
        """Take in one step; return by how much the logarithm of its prediction has changed."""
        ...


class CalibratedTimes:
    """What calibration measured: it stands."""

    is_settled = True

    def __init__(self, times: Sequence[StepTime], move: LayerMove) -> None:
        self._times = times
        self.move = move

    def __len__(self) -> int:
        return len(self._times)

    def __getitem__(self, level: int) -> StepTime:
        return self._times[level]

    def learn(self, step: StepLoad) -> float:
        """Leave the calibration alone: what is left is the correction's."""
        return 0.0


class LearnedTimes:
    """Times that start from a prior shape and are fitted to the engine's own steps.

    A step is a sum of six parts, of which the level changes three: by the time factors of the decoder layers' linears,
    which every server measures at start. So steps of level 0 teach the times of all levels. The parts are fitted by
    non-negative ridge regression of relative errors toward the prior, whose scale is the steps' mean.
    """

    def __init__(self, ladder: Ladder) -> None:
        layers = len(ladder[0].layer_formats)
        copy_s = ladder[0].weight_bytes / layers / _COPY_BYTES_PER_S
        self.move = LayerMove(copy_s, 2 * copy_s)
        self._parts = [_parts_of(level) for level in ladder]
        size = range(len(_PRIOR))
        self._products = [[0.0 for _ in size] for _ in size]  # of the parts' shares of their step, summed over steps
        self._shares = [0.0 for _ in size]
        self._scale_log = log(_UNIT_S)
        self._weight = 0.0
        self._steps = 0
        self._refit_at = 1
        self._fitted = [1.0 for _ in size]  # each part over its prior, in units of the scale
        self._times = self._of_levels()

    def __len__(self) -> int:
        return len(self._times)

    def __getitem__(self, level: int) -> StepTime:
        return self._times[level]

    @property
    def is_settled(self) -> bool:
        """Whether enough steps have been seen for a prediction."""
        return self._steps >= _STEPS_TO_SETTLE

    def learn(self, step: StepLoad) -> float:
        """Take in one step, and fit anew when it is time."""
        before = self._predict(step)
        seconds = step.seconds
        if self.is_settled:
            seconds = min(max(seconds, before / _OUTLIER), before * _OUTLIER)
        self._add(step, seconds)
        if self._steps < self._refit_at:
            return 0.0
        self._refit_at = min(2 * self._steps, self._steps + _REFIT_STEPS)
        self._fit()
        return log(self._predict(step) / before)

    def _predict(self, step: StepLoad) -> float:
        return self._times[step.level].seconds(step.num_seqs, step.prefill_tokens, step.context_tokens)

    def _add(self, step: StepLoad, seconds: float) -> None:
        counts = (1, 1, step.num_seqs, step.num_seqs, step.prefill_tokens, step.context_tokens)
        shares = [part * count / seconds for part, count in zip(self._parts[step.level], counts, strict=True)]
        keep = exp(-step.seconds / _MEMORY_S)
        self._steps += 1
        self._weight = self._weight * keep + 1.0
        self._scale_log -= (log(sum(shares)) + self._scale_log) / self._weight
        for row, own in zip(self._products, shares, strict=True):
            for column, other in enumerate(shares):
                row[column] = row[column] * keep + own * other
        self._shares = [kept * keep + own for kept, own in zip(self._shares, shares, strict=True)]

    def _fit(self) -> None:
        """Solve for the parts by projected Gauss-Seidel, from where they were."""
        scale = exp(self._scale_log)
        fitted, size = self._fitted, range(len(_PRIOR))
        for _ in range(_SWEEPS):
            for i in size:
                row = self._products[i]
                others = sum(row[j] * fitted[j] for j in size) - row[i] * fitted[i]
                wanted = scale * self._shares[i] - scale * scale * others + _PRIOR_STEPS
                fitted[i] = max(wanted / (scale * scale * row[i] + _PRIOR_STEPS), _LEAST)
        self._times = self._of_levels()

    def _of_levels(self) -> list[StepTime]:
        scale = exp(self._scale_log)
        times = []
        for parts in self._parts:
            fixed, linears, seq, seq_linears, prefill, context = (
                scale * part * fitted for part, fitted in zip(parts, self._fitted, strict=True)
            )
            times.append(StepTime(fixed + linears, seq + seq_linears, prefill, context))
        return times


def _parts_of(level: MorphLevel) -> tuple[float, ...]:
    """Return the prior's parts at a level, as its time factors change them; without any, as at level 0."""
    fixed, linears, seq, seq_linears, prefill, context = _PRIOR
    if not level.time_factors:
        return _PRIOR
    (few, few_factor), (many, many_factor) = level.time_factors[0], level.time_factors[-1]
    at_few, at_many = (
        factor * (linears + seq_linears * count) for count, factor in ((few, few_factor), (many, many_factor))
    )
    slope = max((at_many - at_few) / max(many - few, 1), _LEAST * seq_linears)
    return fixed, max(at_few - slope * few, _LEAST * linears), seq, slope, prefill * many_factor, context
