"""How much each parameter decides. PED-ANOVA: deterministic, and needs nothing but numpy."""

from __future__ import annotations

import warnings

import optuna
from optuna.trial import TrialState

METHOD = "PED-ANOVA, best 10 % of the trials against all"
OBJECTIVES = ("violations", "cost")
_FEWEST_TRIALS = 20  # below, a tenth of them is one or two


def importances(study: optuna.Study) -> dict[str, dict[str, float]]:
    """By objective, then by key, most important first; an objective that all trials agree on is left out."""
    found: dict[str, dict[str, float]] = {}
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < _FEWEST_TRIALS:
        return found
    for index, name in enumerate(OBJECTIVES):
        values = sorted(trial.values[index] for trial in complete)
        if values[len(values) // 10] == values[-1]:
            continue  # the best tenth is everybody

        def target(trial: optuna.trial.FrozenTrial, index: int = index) -> float:
            return float(trial.values[index])

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "experimental", and that low values count as good: they are
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            # Keys with a single value have no say, and Optuna leaves them out.
            found[name] = dict(optuna.importance.get_param_importances(study, evaluator=evaluator, target=target))
    return found
