"""One study from its anchors to its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from morphserve.tools.bench import percent
from morphserve.tools.sim import plan_ladder
from morphserve.tools.tune.anchors import score_anchors
from morphserve.tools.tune.evaluate import Evaluator, World
from morphserve.tools.tune.findings import Findings, gather
from morphserve.tools.tune.importance import importances
from morphserve.tools.tune.progress import TuningProgress
from morphserve.tools.tune.report import write_report
from morphserve.tools.tune.space import Space
from morphserve.tools.tune.store import StudyFile
from morphserve.tools.tune.study import Search


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
