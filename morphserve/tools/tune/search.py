"""The search: trials in Optuna, kept in one file, the same ones each time however often it was interrupted.

1. Trial n is a function of the seed, n and the trials of the batches before its own, and of nothing else: not of the
   number of processes, and not of where an earlier run stopped.
2. The file holds finished trials only, in their order.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from morphserve.config import MorphServeConfig
from morphserve.errors import ConfigError
from morphserve.tools.tune.errors import TuningError
from morphserve.tools.tune.evaluate import Invalid, Scored
from morphserve.tools.tune.score import Score, total
from morphserve.tools.tune.space import Parameter, Range, Space
from morphserve.tools.tune.store import StudyFile

# Trials that are asked for on the same history. A constant: were it the number of processes, a machine with more cores
# would find other policies.
BATCH = 10
_RANDOM_TRIALS = 30  # before the model of the earlier ones says anything
_SCORES, _REASON = "scores", "reason"

Evaluate = Callable[[Sequence[MorphServeConfig]], Iterator[Scored]]  # in order, as they become known


def make_sampler(seed: int, number: int) -> optuna.samplers.BaseSampler:
    """Make one trial's sampler: one that carried its random state from trial to trial could not be resumed."""
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=int.from_bytes(digest[:4], "big"),
            n_startup_trials=_RANDOM_TRIALS,
            multivariate=True,
            constant_liar=True,
        )


def distribution_of(parameter: Parameter) -> BaseDistribution:
    """Return what Optuna draws from."""
    spec = parameter.spec
    if not isinstance(spec, Range):
        return CategoricalDistribution(spec.choices)
    if parameter.key.numbers is int:
        return IntDistribution(int(spec.low), int(spec.high), log=spec.log, step=int(spec.step or 1))
    return FloatDistribution(float(spec.low), float(spec.high), log=spec.log, step=spec.step)


class Search:
    """A study in progress."""

    def __init__(self, space: Space, seed: int, file: StudyFile) -> None:
        """Take up what the file has.

        Raises:
            TuningError: its trials are not those that this seed gives.
        """
        self.space = space
        self._seed = seed
        self.file = file
        self._distributions = {p.key.path: distribution_of(p) for p in space.parameters}
        self._study = optuna.create_study(directions=["minimize", "minimize"])
        stored = file.trials()
        whole = len(stored) - len(stored) % BATCH
        for trial in stored[:whole]:
            self._study.add_trial(trial)
        self._rest = stored[whole:]

    @property
    def trials(self) -> list[FrozenTrial]:
        """Finished trials, by number."""
        return [*self._study.get_trials(deepcopy=False), *self._rest]

    def run(self, num_trials: int, evaluate: Evaluate, done: Callable[[FrozenTrial], None]) -> None:
        """Go on until there are so many trials."""
        while len(self.trials) < num_trials:
            first = len(self._study.trials)
            self._run_batch(min(BATCH, num_trials - first), evaluate, done)

    def _run_batch(self, size: int, evaluate: Evaluate, done: Callable[[FrozenTrial], None]) -> None:
        asked = [self._ask() for _ in range(size)]
        rest, self._rest = self._rest, []
        for trial, stored in zip(asked, rest, strict=False):
            self._check_same(trial, stored)
            self._tell(trial, stored.state, stored.values, stored.user_attrs)
        fresh = asked[len(rest) :]
        configs = [self._config(trial.params) for trial in fresh]
        answers = evaluate([config for config in configs if isinstance(config, MorphServeConfig)])
        for trial, config in zip(fresh, configs, strict=True):
            scored = config if isinstance(config, Invalid) else next(answers)
            frozen = self._tell(trial, *_outcome(scored))
            self.file.add(frozen)
            done(frozen)

    def _ask(self) -> optuna.Trial:
        self._study.sampler = make_sampler(self._seed, len(self._study.get_trials(deepcopy=False)))
        return self._study.ask(self._distributions)

    def _config(self, values: dict[str, Any]) -> MorphServeConfig | Invalid:
        try:
            return self.space.with_values(values)
        except ConfigError as e:
            return Invalid(str(e))

    def _tell(
        self, trial: optuna.Trial, state: TrialState, values: Sequence[float] | None, attrs: dict[str, Any]
    ) -> FrozenTrial:
        for name, value in attrs.items():
            trial.set_user_attr(name, value)
        return self._study.tell(trial, values if state is TrialState.COMPLETE else None, state)

    def _check_same(self, trial: optuna.Trial, stored: FrozenTrial) -> None:
        if trial.params != stored.params:
            raise TuningError(
                f"{self.file.path}: trial {stored.number} has {stored.params}, here seed {self._seed} gives "
                f"{trial.params}. Was it made on another machine? Start a new study with another --out."
            )


def _outcome(scored: Scored) -> tuple[TrialState, list[float] | None, dict[str, Any]]:
    if isinstance(scored, Invalid):
        return TrialState.PRUNED, None, {_REASON: scored.reason}
    overall = total(scored)
    return TrialState.COMPLETE, [overall.violations, overall.cost], {_SCORES: [asdict(s) for s in scored]}


def scores_of(trial: FrozenTrial) -> tuple[Score, ...]:
    """Return the scores of a complete trial, one a dev window."""
    return tuple(Score(**figures) for figures in trial.user_attrs[_SCORES])


def reason_of(trial: FrozenTrial) -> str | None:
    """Return why a trial was pruned; None if it was not."""
    reason = trial.user_attrs.get(_REASON)
    return None if reason is None else str(reason)
