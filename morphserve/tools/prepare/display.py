"""How far a preparation is: one bar a part on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TextIO

from morphserve.tools.apart import Progress

_LINE_INTERVAL_S = 30.0


@contextlib.contextmanager
def show_progress(stream: TextIO) -> Iterator[Progress]:
    """Yield what is told of the progress: what is being done, how much of it is done, of how much."""
    if not stream.isatty():
        yield _Lines(stream)
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars
    except ImportError:
        yield _Lines(stream)
        return
    columns = TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bars(*columns, console=Console(file=stream)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for earlier in tasks.values():
                    bars.stop_task(earlier)
                tasks[what] = bars.add_task(what, total=None)
            bars.update(tasks[what], completed=done, total=total or None)

        yield show


class _Lines:
    """Says when another part begins, and how far it is twice a minute."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._what = ""
        self._said_s = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if what == self._what and done < total and now_s - self._said_s < _LINE_INTERVAL_S:
            return
        self._what, self._said_s = what, now_s
        self._stream.write(f"{what}: {done} of {total}\n" if total else f"{what} ...\n")
        self._stream.flush()
