"""Progress on stderr: a bar on a terminal, a line every fifty trials elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_EVERY = 50


class TuningProgress:
    """A context manager; `enabled=False` says nothing at all."""

    def __init__(self, enabled: bool = True) -> None:
        """Nothing is shown before `__enter__`."""
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
        """What is being done now."""
        self._bar.update(self._task, description=what)
        if self._lines:
            sys.stderr.write(f"{what}\n")

    def begin(self, num_done: int, total: int) -> None:
        """So many trials are to be there, so many are."""
        self._num_done, self._total = num_done, total
        self._bar.update(self._task, completed=num_done, total=total)

    def trial_done(self, note: str) -> None:
        """One more."""
        self._num_done += 1
        self._bar.update(self._task, advance=1, note=note)
        if self._lines and self._num_done % _LINE_EVERY == 0:
            sys.stderr.write(f"{self._num_done} of {self._total} trials, {note}\n")
