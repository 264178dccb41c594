"""How long a step of each level takes: as calibration measured it, or learned from the engine's own steps."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from statistics import median
from typing import Protocol

from policies.slo.times.moves import LearnedMoves
from policies.slo.times.ridge import NonNegativeRidge
from policies.slo.times.runs import StepRun
from policies.step_times import LayerMove, StepTime
from policies.types import Ladder, MorphLevel, Signals

# What a step of level 0 is made of, as shares of the step of a lone sequence: what no format changes (Python, sampling,
# the head), the decoder layers' linears; for each sequence both again; a prompt token in the linears; a token of KV.
# Between a small model on two CPU cores (.05 a sequence, 3e-4 a token of KV) and a large one on a GPU (.003, 5e-6).
_PRIOR = (0.3, 0.7, 0.005, 0.01, 0.015, 4e-5)
_UNIT_S = 0.02  # a lone sequence's step, until the first steps have been seen
_FIRST_STEPS = 32  # until predictions are made: a stall or two among them change little
_FEW_STEPS, _FEW_STEPS_S = 8, 2.0  # or so many, where they take so long together: a promise does not wait for 32
_FIRST_SPREAD = 10.0  # one of them that is further off the prior than that, by their median, is a stall
_STALL = 2.0  # so much does a later step count that took longer; less, too
_PRIOR_STEPS = 0.01  # that each part of the prior counts as: steps scatter by a tenth, it by the whole
_LEAST = 0.02  # of a part's prior: none vanishes, so that all times stay above 0
_MEMORY_S = 3600.0  # time constant, in seconds of steps; what changes faster is the correction's
_REFIT_STEPS = 16


class LevelTimes(Protocol):
    """Step times by level, and the time that a layer takes to switch."""

    @property
    def move(self) -> LayerMove:
        """Seconds of a layer that switches."""
        ...

    @property
    def is_settled(self) -> bool:
        """Whether predictions may be made of them."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, level: int) -> StepTime: ...

    def watch(self, s: Signals) -> None:
        """Take in how far a transition is."""
        ...

    def learn(self, run: StepRun) -> None:
        """Take in some steps, one after the other."""
        ...


class CalibratedTimes:
    """What calibration measured: it stands, and what is left is the correction's."""

    is_settled = True

    def __init__(self, times: Sequence[StepTime], move: LayerMove) -> None:
        self._times = times
        self.move = move

    def __len__(self) -> int:
        return len(self._times)

    def __getitem__(self, level: int) -> StepTime:
        return self._times[level]

    def watch(self, s: Signals) -> None:
        """Leave the moves alone."""

    def learn(self, run: StepRun) -> None:
        """Leave the times alone."""


class LearnedTimes:
    """Times that start from a prior shape and are fitted to the engine's own steps.

    A step is a sum of six parts, of which the level changes three: by the time factors of the decoder layers' linears,
    which every server measures at start. So steps of level 0 teach the times of all levels. The parts are fitted to
    steps in units of what was predicted for them, by non-negative ridge regression toward the prior.
    """

    def __init__(self, ladder: Ladder, moves_beside_steps: bool = False) -> None:
        """Start from the prior."""
        self._parts = [_parts_of(level) for level in ladder]
        self._moves = LearnedMoves(ladder, moves_beside_steps)
        self._fit = NonNegativeRidge(len(_PRIOR), _PRIOR_STEPS, _LEAST)
        self._first: list[StepRun] | None = []  # None: they were enough
        self._until_refit = _REFIT_STEPS
        self._unit_s = _UNIT_S
        self._fitted = [1.0 for _ in _PRIOR]  # each part over its prior
        self._times = self._work_out()  # by level

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, level: int) -> StepTime:
        return self._times[level]

    @property
    def move(self) -> LayerMove:
        """Seconds of a layer that switches."""
        return self._moves.move

    @property
    def is_settled(self) -> bool:
        """Whether enough steps have been seen for a prediction."""
        return self._first is None

    def watch(self, s: Signals) -> None:
        """Follow the transition under way."""
        self._moves.watch(s)

    def learn(self, run: StepRun) -> None:
        """Take in some steps, and fit anew when it is time."""
        if self._first is not None:
            self._first.append(run)
            if _are_enough(self._first):
                self._begin(self._first)
                self._first = None
            return
        predicted = run.predicted_s(self[run.level])
        self._add(run, predicted, min(max(run.seconds / predicted, 1 / _STALL), _STALL))
        self._until_refit -= run.num_steps
        if self._until_refit <= 0:
            self._refit()

    def take_over(self, other: LearnedTimes) -> None:
        """Go on with what another one has learned, unless it is of another ladder."""
        if other._parts != self._parts:
            return
        self._fit, self._moves, self._first = other._fit, other._moves, other._first
        self._unit_s, self._fitted, self._until_refit = other._unit_s, other._fitted, other._until_refit
        self._times = other._times

    def _begin(self, runs: list[StepRun]) -> None:
        """Take the unit from the first steps together, and leave out those that say something else."""
        ratios = [run.seconds / run.predicted_s(self[run.level]) for run in runs]
        usual = median(ratios)
        self._unit_s *= usual
        for run, ratio in zip(runs, ratios, strict=True):
            if usual / _FIRST_SPREAD < ratio < usual * _FIRST_SPREAD:
                self._add(run, run.seconds * usual / ratio, ratio / usual)
        self._refit()

    def _add(self, run: StepRun, predicted: float, over_predicted: float) -> None:
        steps, seqs = run.num_steps, run.num_seqs
        counts = (steps, steps, seqs, seqs, run.prefill_tokens, run.context_tokens)
        unit = self._unit_s / predicted
        row = [unit * part * count for part, count in zip(self._parts[run.level], counts, strict=True)]
        self._fit.add(row, over_predicted, exp(-run.seconds / _MEMORY_S))

    def _refit(self) -> None:
        self._until_refit = _REFIT_STEPS
        self._fitted = self._fit.solve()
        self._times = self._work_out()

    def _work_out(self) -> list[StepTime]:
        times = []
        for parts in self._parts:
            fixed, linears, seq, seq_linears, prefill, context = (
                self._unit_s * part * fitted for part, fitted in zip(parts, self._fitted, strict=True)
            )
            times.append(StepTime(fixed + linears, seq + seq_linears, prefill, context))
        return times


def _are_enough(runs: list[StepRun]) -> bool:
    if len(runs) < _FEW_STEPS:
        return False
    return sum(run.seconds for run in runs) >= _FEW_STEPS_S or sum(run.num_steps for run in runs) >= _FIRST_STEPS


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
