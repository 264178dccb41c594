"""Everything that a report of a study says, gathered once."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from morphserve.tools.tune.baselines import CURRENT, Baseline, score_all
from morphserve.tools.tune.errors import TuningError
from morphserve.tools.tune.evaluate import Evaluator, World
from morphserve.tools.tune.score import Scores
from morphserve.tools.tune.search import Search, reason_of, scores_of
from morphserve.tools.tune.selection import Best, Candidate, best_within, pareto_front, verdict, warnings_of
from morphserve.tools.tune.space import Space

METHOD = "PED-ANOVA, best 10 % of the trials against all"
OBJECTIVES = ("violations", "cost")
_FEWEST_TRIALS = 20  # below, a tenth of them is one or two


@dataclass(frozen=True, slots=True)
class Results:
    """The results of a study as far as it has come."""

    world: World
    space: Space
    trials: list[FrozenTrial]
    baselines: list[Baseline]
    front: list[Candidate]  # with held-out scores
    best: list[Best]  # one for each limit
    importances: dict[str, dict[str, float]]
    warnings: list[str]
    made: Mapping[str, Any]  # how to repeat it

    @property
    def current(self) -> Baseline:
        """The config as given, scored."""
        return next(baseline for baseline in self.baselines if baseline.name == CURRENT)

    @property
    def num_complete(self) -> int:
        """Trials with a score."""
        return sum(trial.state is TrialState.COMPLETE for trial in self.trials)

    @property
    def refusals(self) -> dict[str, int]:
        """Reasons for pruning, most frequent first, and how often each was."""
        return _refusals(self.trials)

    def document(self, files: Mapping[str, str]) -> dict[str, Any]:
        """Return the one JSON document that a study ends with."""
        return {
            "made": dict(self.made),
            "trials": {
                "total": len(self.trials),
                "complete": self.num_complete,
                "pruned": len(self.trials) - self.num_complete,
            },
            "anchors": [{"name": b.name, **_both(b.scores)} for b in self.baselines],
            "front": [{"trial": c.number, **_both(c.scores)} for c in self.front],
            "best": [self._best_document(p, files) for p in self.best],
            "importance": self.importances,
            "warnings": self.warnings,
            **files,
        }

    def _best_document(self, p: Best, files: Mapping[str, str]) -> dict[str, Any]:
        out: dict[str, Any] = {"max_violation_rate": p.limit, "trial": None}
        if p.candidate is not None:
            out |= {"trial": p.candidate.number, **_both(p.candidate.scores), "values": dict(p.candidate.values)}
            out |= {"verdict": verdict(p.candidate, self.current), "file": f"{p.name}.yaml"}
        return out


def _both(scores: Scores) -> dict[str, Any]:
    held_out = scores.on_held_out
    return {"dev": scores.on_dev.document(), "held_out": None if held_out is None else held_out.document()}


def gather(
    evaluator: Evaluator,
    search: Search,
    baselines: list[Baseline],
    limits: tuple[float, ...],
    made: Mapping[str, Any],
) -> Results:
    """Score the front on the held-out windows, and judge.

    Raises:
        TuningError: no trial could be served.
    """
    world, space, trials = evaluator.world, search.space, search.trials
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    if not complete:
        reasons = "; ".join(f"{count} times: {reason}" for reason, count in list(_refusals(trials).items())[:3])
        raise TuningError(
            f"none of {len(trials)} trials is a policy that a server would start with ({reasons}). Narrow the space."
        )
    front = pareto_front([Candidate(t.number, t.params, Scores(scores_of(t), ())) for t in complete])
    named = [(f"trial {c.number}", space.with_values(c.values)) for c in front]
    held_out = score_all(evaluator, named, world.held_out)
    front = [
        Candidate(c.number, c.values, Scores(c.scores.dev, unseen.held_out))
        for c, unseen in zip(front, held_out, strict=True)
    ]
    best = best_within(front, limits)
    shares = importances(search.file.study)
    return Results(world, space, trials, baselines, front, best, shares, warnings_of(best, baselines, front), made)


def importances(study: optuna.Study) -> dict[str, dict[str, float]]:
    """Return how much each key decides, by objective, most important first; one that all trials agree on is left out.

    PED-ANOVA: deterministic, and needs nothing but numpy.
    """
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


def _refusals(trials: list[FrozenTrial]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for trial in trials:
        reason = reason_of(trial)
        if reason is not None:
            # Figures in a reason differ from trial to trial, what it says does not.
            short = re.sub(r"\b\d+(\.\d+)?\b", "…", reason)
            counts[short] = counts.get(short, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
