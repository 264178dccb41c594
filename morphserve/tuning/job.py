"""One study from its anchors to its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from morphserve.replay.summary import percent
from morphserve.simulation.morphing import plan_ladder
from morphserve.tuning.anchors import score_anchors
from morphserve.tuning.evaluate import Evaluator, World
from morphserve.tuning.findings import Findings, gather
from morphserve.tuning.importance import importances
from morphserve.tuning.progress import TuningProgress
from morphserve.tuning.report import write_report
from morphserve.tuning.space import Space
from morphserve.tuning.store import StudyFile
from morphserve.tuning.study import Search


def run_study(
    space: Space,
    world: World,
    settings: Mapping[str, Any],
    made: Mapping[str, Any],
    file: Path,
    *,
    num_trials: int,
    limits: tuple[float, ...],
    seed: int,
    jobs: int,
    step_times: Path,
    quiet: bool,
) -> tuple[Findings, Path]:
    """Anchors, then trials until there are enough, then the report beside the study file.

    Raises:
        TuningError: the config as given cannot be served, or the file holds another study.
    """
    ladder = plan_ladder(space.config, world.server, world.calibration, world.profile)
    with TuningProgress(enabled=not quiet) as progress, Evaluator(world, jobs) as evaluator:
        progress.say("anchors")
        # First, because what is wrong with them is wrong with every trial.
        anchors = score_anchors(evaluator, space.config, ladder)
        store = StudyFile(file, settings)
        try:
            search = Search(space, seed, store)
            progress.say("trials")
            progress.begin(len(search.trials), num_trials)
            fewest: dict[str, float] = {}

            def done(trial: FrozenTrial) -> None:
                if trial.values is not None:
                    fewest["late"] = min(trial.values[0], fewest.get("late", 1.0))
                progress.trial_done(f"fewest violations {percent(fewest.get('late'))}")

            search.run(num_trials, lambda configs: evaluator.scores(configs, world.dev), done)
            progress.say("report")
            shares = importances(store.study)
            findings = gather(evaluator, space, search.trials, anchors, limits, shares, made)
            return findings, write_report(findings, file.parent, step_times)
        finally:
            store.close()
