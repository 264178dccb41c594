"""Every run of a comparison in turn, on whatever runs take place: started servers, given ones, a simulated engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from morphserve.tools.bench.comparison import Comparison, static_format
from morphserve.tools.bench.load.measure import Measurement
from morphserve.tools.bench.report.console import ConsoleProgress
from morphserve.tools.bench.report.results import Observed, RunResult
from morphserve.tools.machine import describe_machine
from morphserve.tools.workload import save_answers


@dataclass(frozen=True, slots=True)
class Turn:
    """One run: of NAME, in REPEAT."""

    comparison: Comparison
    name: str
    repeat: int  # from 1
    directory: Path  # of its files
    setup: Mapping[str, Any] = field(default_factory=dict)  # recorded with it

    @property
    def title(self) -> str:
        """Its name for people."""
        repeats = self.comparison.repeats
        return self.name if repeats == 1 else f"{self.name} {self.repeat}/{repeats}"

    @property
    def key(self) -> tuple[str, str]:
        """Window and name: what its repeats have in common."""
        return self.comparison.window, self.name

    @property
    def measurement(self) -> Measurement:
        """What is sent, and how long it is watched: a baseline stays at its level, so nobody waits for level 0."""
        what = self.comparison.measurement
        return replace(what, restore_wait_s=0.0) if static_format(self.name) else what

    def result(self, seen: Observed) -> RunResult:
        """Return what was seen as the result of this run."""
        setup = {**self.comparison.setup, **describe_machine(), **self.setup, **seen.setup}
        slo = self.comparison.measurement.slo
        return RunResult(self.name, self.repeat, self.directory, slo, seen.replayed, seen.series, seen.status, setup)


class Backend(Protocol):
    """What runs take place on."""

    def run(self, turn: Turn) -> Observed:
        """Send the workload once.

        Raises:
            ReplayError: a server does not start or does not answer.
            ConfigError, WorkloadError: it would refuse the config, or a request.
        """
        ...


def turns(comparisons: Sequence[Comparison], rotate: bool = False) -> Iterator[Turn]:
    """Yield all runs, interleaved: a, b, a, b, so that a drift of the machine meets all of them alike.

    Args:
        comparisons: windows of one sweep; they differ in workload, prompts and directory only.
        rotate: each repeat and window begins with another run, so that none always follows the same one.
    """
    names, repeats = comparisons[0].names, comparisons[0].repeats
    rounds = [(repeat, comparison) for repeat in range(1, repeats + 1) for comparison in comparisons]
    for number, (repeat, comparison) in enumerate(rounds):
        first = number % len(names) if rotate else 0
        for name in (*names[first:], *names[:first]):
            numbered = repeats > 1 or comparison.window
            yield Turn(comparison, name, repeat, comparison.out / (f"{name}.{repeat}" if numbered else name))


def run_turns(planned: Iterable[Turn], backend: Backend, progress: ConsoleProgress) -> Iterator[RunResult]:
    """Do and yield one run after another; each is saved as soon as it is there.

    Raises:
        ReplayError, ConfigError, WorkloadError: see `Backend`.
    """
    for turn in planned:
        result = turn.result(backend.run(turn))
        result.save()
        save_answers(turn.directory, turn.measurement.prompts, result.replayed.outcomes)
        for outcome in result.replayed.outcomes:  # K entries a token: in the file from here on
            outcome.top_logprobs.clear()
        progress.finished(result)
        yield result


def run_all(comparison: Comparison, backend: Backend, progress: ConsoleProgress) -> list[RunResult]:
    """Do all runs of one comparison.

    Raises:
        ReplayError, ConfigError, WorkloadError: see `Backend`.
    """
    return list(run_turns(turns([comparison]), backend, progress))
