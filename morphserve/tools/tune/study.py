"""One study from its baselines to its report, and its progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from optuna.trial import FrozenTrial
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from morphserve.tools.bench import percent
from morphserve.tools.sim import plan_ladder
from morphserve.tools.tune.baselines import score_baselines
from morphserve.tools.tune.evaluate import Evaluator, World
from morphserve.tools.tune.report import write_report
from morphserve.tools.tune.results import Results, gather
from morphserve.tools.tune.search import Search
from morphserve.tools.tune.space import Space
from morphserve.tools.tune.store import StudyFile

_LINE_EVERY = 50


@dataclass(frozen=True, slots=True)
class StudyOptions:
    """The size of a study, and where it goes."""

    file: Path  # the report lies beside it
    num_trials: int
    limits: tuple[float, ...]  # on the violation rate
    seed: int
    jobs: int  # simulating processes; the result is the same
    step_times: Path
    quiet: bool


def run_study(
    space: Space, world: World, settings: Mapping[str, Any], made: Mapping[str, Any], options: StudyOptions
) -> tuple[Results, Path]:
    """Score the baselines, run trials until there are enough, write the report, and return it with its path.

    Raises:
        TuningError: the config as given cannot be served, or the file holds another study.
    """
    ladder = plan_ladder(space.config, world.server, world.calibration, world.profile)
    with TuningProgress(enabled=not options.quiet) as progress, Evaluator(world, options.jobs) as evaluator:
        progress.say("anchors")
        # First, because what is wrong with them is wrong with every trial.
        baselines = score_baselines(evaluator, space.config, ladder)
        store = StudyFile(options.file, settings)
        try:
            search = Search(space, options.seed, store)
            progress.say("trials")
            progress.begin(len(search.trials), options.num_trials)
            fewest: dict[str, float] = {}

            def done(trial: FrozenTrial) -> None:
                if trial.values is not None:
                    fewest["late"] = min(trial.values[0], fewest.get("late", 1.0))
                progress.trial_done(f"fewest violations {percent(fewest.get('late'))}")

            search.run(options.num_trials, lambda configs: evaluator.scores(configs, world.dev), done)
            progress.say("report")
            results = gather(evaluator, search, baselines, options.limits, made)
            return results, write_report(results, options.file.parent, options.step_times)
        finally:
            store.close()


class TuningProgress:
    """A context manager for progress on stderr: a bar on a terminal, a line every fifty trials elsewhere."""

    def __init__(self, enabled: bool = True) -> None:
        console = Console(stderr=True)
        self._lines = enabled and not console.is_terminal
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._bar.add_task("trials", total=None, note="")
        self._num_done = self._total = 0

    def __enter__(self) -> TuningProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, what: str) -> None:
        """Show what is being done now."""
        self._bar.update(self._task, description=what)
        if self._lines:
            sys.stderr.write(f"{what}\n")

    def begin(self, num_done: int, total: int) -> None:
        """Show that `num_done` trials are there, of `total`."""
        self._num_done, self._total = num_done, total
        self._bar.update(self._task, completed=num_done, total=total)

    def trial_done(self, note: str) -> None:
        """Count one trial more."""
        self._num_done += 1
        self._bar.update(self._task, advance=1, note=note)
        if self._lines and self._num_done % _LINE_EVERY == 0:
            sys.stderr.write(f"{self._num_done} of {self._total} trials, {note}\n")
