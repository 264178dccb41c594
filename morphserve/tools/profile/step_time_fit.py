"""From timed engine steps to a step-time model: least squares of relative errors, no negative coefficient."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from morphserve.errors import MorphServeError
from policies import StepLoad, StepTime

_TRIM = 0.02  # slowest share of the steps left out: the machine did something else
_MIN_STEPS = 20


def fit_step_time(steps: Sequence[StepLoad]) -> tuple[StepTime, float]:
    """Coefficients of all layers in one format, and the root mean square of the relative error.

    Four coefficients are few enough to try every subset as the positive ones; the best fit without a negative
    coefficient is the least-squares solution under that constraint.

    Raises:
        MorphServeError: too few steps to tell anything.
    """
    if len(steps) < _MIN_STEPS:
        raise MorphServeError(f"{len(steps)} timed steps, needs {_MIN_STEPS} or more. Raise --rounds.")
    wanted = np.array([step.seconds for step in steps])
    load = np.array([[1.0, s.num_seqs, s.prefill_tokens, s.context_tokens] for s in steps])
    keep = np.ones(len(steps), dtype=bool)
    for _ in range(2):  # the second time without what the first could not explain
        found = _nonnegative(load[keep], wanted[keep])
        error = (load @ found - wanted) / wanted
        keep = -error <= np.quantile(-error, 1 - _TRIM)
    base, seq, prefill, context = (float(x) for x in found)
    if base <= 0:
        raise MorphServeError("the steps' times do not fit base + seqs + prefill + context. Is the machine busy?")
    return StepTime(base, seq, prefill, context), float(np.sqrt(np.mean(error[keep] ** 2)))


def _nonnegative(load: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    rows = load / wanted[:, None]
    best, least = np.zeros(4), np.inf
    for size in range(1, 5):
        for columns in combinations(range(4), size):
            solution, *_ = np.linalg.lstsq(rows[:, columns], np.ones(len(rows)), rcond=None)
            if (solution < 0).any():
                continue
            full = np.zeros(4)
            full[list(columns)] = solution
            loss = float(np.sum((rows @ full - 1) ** 2))
            if loss < least:
                best, least = full, loss
    return best
