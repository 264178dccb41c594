"""What predictions have been worth so far: a factor on step times, and an error that is admitted."""

from __future__ import annotations

from math import exp, log, sqrt

from policies.slo.times.level_times import LevelTimes
from policies.slo.times.runs import Runs, StepRun
from policies.types import Cohort, Signals, StepLoad

_TAU_S = 5.0  # time constant of factor and error, in seconds of measured steps
_PRIOR_S = 1.0  # seconds of steps that the step times count as
_PRIOR_SIGMA = 0.15  # its relative error until seen
_WAIT_SIGMA = 0.30  # relative error of predicted waits until seen
_WAIT_WEIGHT = 0.1  # of the newest
_SOFT_SHARE = 0.25  # of the promised wait: an error that is small against it matters to nobody


class Correction:
    """A running estimate of how far the step times are off at the moment: it learns from each step."""

    def __init__(self, times: LevelTimes, ttft_s: float, sends_ahead: bool = False) -> None:
        """
        Args:
            times: to be corrected.
            ttft_s: promised.
            sends_ahead: of the engine; see runs.py.
        """
        self._times = times
        self._soft_s = _SOFT_SHARE * ttft_s
        self._weight = _PRIOR_S
        self._mean = 0.0  # of the logarithm of measured over predicted
        self._square = _PRIOR_SIGMA**2
        self._wait_square = _WAIT_SIGMA**2
        self._watched: tuple[float, float] | None = None  # arrival of a waiting request, and when it was to be served
        self._seen: StepLoad | None = None
        self._runs = Runs() if sends_ahead else None

    @property
    def factor(self) -> float:
        """Measured over predicted step time."""
        return exp(self._mean)

    @property
    def step_sigma(self) -> float:
        """Relative error of a step's prediction after the factor."""
        return sqrt(max(self._square - self._mean**2, 0.0))

    @property
    def sigma(self) -> float:
        """Relative error of a predicted wait."""
        return sqrt(self._wait_square + self.step_sigma**2 / 4)  # a wait averages over steps

    def learn(self, signals: Signals) -> StepLoad | None:
        """Compare the step that has just ended with its prediction.

        Returns:
            The step; None when it is the one of the last time, or there was none.
        """
        self._learn_wait(signals)
        step = signals.last_step
        if step is None and self._runs is not None:
            self._runs.forget(is_idle=not signals.num_running)
        if step is None or step is self._seen:
            return None
        self._seen = step
        if step.level < len(self._times):
            run = StepRun.of(step) if self._runs is None else self._runs.add(step)
            if run is not None:
                self._learn_run(run)
        return step

    def _learn_run(self, run: StepRun) -> None:
        self._times.learn(run)
        if not self._times.is_settled:
            return
        error = log(run.seconds / run.predicted_s(self._times[run.level]))
        error = min(max(error, -2.0), 2.0)  # a stall of the machine is one step, not a trend
        keep = exp(-run.seconds / _TAU_S)
        self._weight = self._weight * keep + run.seconds
        share = run.seconds / self._weight
        self._mean += share * (error - self._mean)
        self._square += share * (error * error - self._square)

    def watch(self, cohort: Cohort, served_at_s: float) -> None:
        """Remember one prediction to be judged: unless one is pending."""
        if self._watched is None:
            self._watched = (cohort.last_arrival_s, served_at_s)

    def forget(self) -> None:
        """Drop the pending prediction: the level changes, and what was predicted for the old one is no error."""
        self._watched = None

    def _learn_wait(self, signals: Signals) -> None:
        if self._watched is None:
            return
        arrival_s, served_at_s = self._watched
        patience_s = 2 * (served_at_s - arrival_s) + self._soft_s
        waits = any(not c.has_token and c.first_arrival_s <= arrival_s for c in signals.waiting)
        if waits and signals.now_s - arrival_s <= patience_s:
            return
        self._watched = None
        predicted, real = served_at_s - arrival_s, signals.now_s - arrival_s
        error = log((real + self._soft_s) / (max(predicted, 0.0) + self._soft_s))
        self._wait_square += _WAIT_WEIGHT * (error * error - self._wait_square)
