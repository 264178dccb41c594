"""Everything that a report of a study says, gathered once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from morphserve.tools.tune.anchors import CURRENT, Anchor, Scores, score_all
from morphserve.tools.tune.errors import TuningError
from morphserve.tools.tune.evaluate import Evaluator, World
from morphserve.tools.tune.picks import Candidate, Pick, pareto_front, pick, verdict, warnings_of
from morphserve.tools.tune.space import Space
from morphserve.tools.tune.study import reason_of, scores_of


@dataclass(frozen=True, slots=True)
class Findings:
    """Of a study as far as it has come."""

    world: World
    space: Space
    trials: list[FrozenTrial]
    anchors: list[Anchor]
    front: list[Candidate]  # with held-out scores
    picks: list[Pick]
    importances: dict[str, dict[str, float]]
    warnings: list[str]
    made: Mapping[str, Any]  # how to repeat it

    @property
    def current(self) -> Anchor:
        """The config as given."""
        return next(anchor for anchor in self.anchors if anchor.name == CURRENT)

    @property
    def num_complete(self) -> int:
        """Trials with a score."""
        return sum(trial.state is TrialState.COMPLETE for trial in self.trials)

    @property
    def refusals(self) -> dict[str, int]:
        """Why combinations were pruned, most frequent reason first."""
        return _refusals(self.trials)

    def document(self, files: Mapping[str, str]) -> dict[str, Any]:
        """The one JSON document that a study ends with."""
        return {
            "made": dict(self.made),
            "trials": {
                "total": len(self.trials),
                "complete": self.num_complete,
                "pruned": len(self.trials) - self.num_complete,
            },
            "anchors": [{"name": a.name, **_both(a.scores)} for a in self.anchors],
            "front": [{"trial": c.number, **_both(c.scores)} for c in self.front],
            "best": [self._pick_document(p, files) for p in self.picks],
            "importance": self.importances,
            "warnings": self.warnings,
            **files,
        }

    def _pick_document(self, p: Pick, files: Mapping[str, str]) -> dict[str, Any]:
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
    space: Space,
    trials: list[FrozenTrial],
    anchors: list[Anchor],
    limits: tuple[float, ...],
    importances: dict[str, dict[str, float]],
    made: Mapping[str, Any],
) -> Findings:
    """Score the front on the held-out windows, and judge.

    Raises:
        TuningError: no trial could be served.
    """
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    if not complete:
        reasons = "; ".join(f"{count} times: {reason}" for reason, count in list(_refusals(trials).items())[:3])
        raise TuningError(
            f"none of {len(trials)} trials is a policy that a server would start with ({reasons}). Narrow the space."
        )
    front = pareto_front([Candidate(t.number, t.params, Scores(scores_of(t), ())) for t in complete])
    named = [(f"trial {c.number}", space.with_values(c.values)) for c in front]
    held_out = score_all(evaluator, named, evaluator.world.held_out)
    front = [
        Candidate(c.number, c.values, Scores(c.scores.dev, unseen.held_out))
        for c, unseen in zip(front, held_out, strict=True)
    ]
    picks = pick(front, limits)
    return Findings(
        evaluator.world, space, trials, anchors, front, picks, importances, warnings_of(picks, anchors, front), made
    )


def _refusals(trials: list[FrozenTrial]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for trial in trials:
        reason = reason_of(trial)
        if reason is not None:
            # Figures in a reason differ from trial to trial, what it says does not.
            short = re.sub(r"\b\d+(\.\d+)?\b", "…", reason)
            counts[short] = counts.get(short, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
