"""Progress on stderr: a bar on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from morphserve.tools.bench.report.results import RunResult
from morphserve.tools.bench.report.tables import percent, seconds
from morphserve.tools.workload import Outcome


class ConsoleProgress:
    """What the user sees while runs are made; a context manager."""

    def __init__(self, enabled: bool = True) -> None:
        """Write to stderr; `enabled=False` says nothing at all."""
        self._enabled = enabled
        console = Console(stderr=True)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not (enabled and console.is_terminal),
        )
        self._task: TaskID | None = None
        self._failed = 0

    def __enter__(self) -> ConsoleProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def starting(self, title: str) -> None:
        """Say that a server is being started."""
        self._say(f"{title}: starting the server")
        self._replace(f"{title}: server starts", total=None)

    def fitting(self, title: str) -> None:
        """Say that its steps are being measured."""
        self._say(f"{title}: measuring its steps, to fit load and limits to this machine")
        self._replace(f"{title}: steps are measured", total=None)

    def waiting(self, seconds: float) -> None:
        """Show how long it has not been up."""
        self._note(f"{seconds:.0f} s")

    def measuring(self, title: str, num_requests: int) -> None:
        """Say that the workload begins."""
        self._say(f"{title}: replaying {num_requests} requests")
        self._replace(title, total=num_requests)
        self._failed = 0

    def request_done(self, outcome: Outcome) -> None:
        """Count a request that ended."""
        self._failed += not outcome.ok
        if self._task is not None:
            self._bars.advance(self._task)
        self._note(f"[red]{self._failed} failed" if self._failed else "answered")

    def finished(self, result: RunResult) -> None:
        """Say what was found in a run."""
        self._clear()
        figures = result.figures()
        self._say(
            f"{result.name}: {percent(figures['violation_rate'])} SLO violations of {figures['sent']}, "
            f"P95 TTFT {seconds(figures['ttft_p95_s'])}, {figures['output_tok_s']:.0f} tok/s"
        )

    def _replace(self, description: str, total: int | None) -> None:
        self._clear()
        self._task = self._bars.add_task(description, total=total, note="")

    def _clear(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def _note(self, note: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, note=note)

    def _say(self, line: str) -> None:
        if not self._enabled:
            return
        if self._bars.disable:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        else:
            self._bars.console.print(line, highlight=False)
