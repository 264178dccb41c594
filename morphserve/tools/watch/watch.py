"""A live view of a running server: level and ladder, KV blocks, queue, late requests, quality spent, transitions.

On a terminal it fills the screen; into a pipe or a file it writes a line an interval, and one for each transition.
Ctrl-C ends it: with 0, or with 1 where the server does not answer by then. A server that goes away is waited for.

    morphserve watch --url http://127.0.0.1:8000 --interval 0.5
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, Protocol

from morphserve.status_view import Panel, panels
from morphserve.tools.command import command_parser
from morphserve.tools.options import number
from morphserve.tools.watch.client import NoStatus, add_server, fetch_status
from morphserve.tools.watch.text import one_liners, plain

Fetch = Callable[[str], dict[str, Any]]


class View(Protocol):
    """Where the panels go; a context manager."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: Any) -> Any: ...

    def show(self, shown: Sequence[Panel], error: str, since_s: float) -> None:
        """Show the panels; with an `error` they are those of `since_s` seconds ago."""
        ...


class LineView:
    """A line an interval, and one for each transition: for pipes and files."""

    def __init__(self, clock: Callable[[], str] = lambda: time.strftime("%H:%M:%S")) -> None:
        self._clock = clock
        self._revisions: dict[str, int] = {}  # engine |-> its newest transition that was written
        self._error = ""

    def __enter__(self) -> LineView:
        return self

    def __exit__(self, *exception: Any) -> None:
        return None

    def show(self, shown: Sequence[Panel], error: str, since_s: float) -> None:
        """Write the lines. An error that lasts is written once."""
        if error:
            if not self._error:
                self._write(error)
        else:
            for panel in shown:
                self._write_new_changes(panel, f"{panel.title}: " if len(shown) > 1 else "")
            for line in one_liners(shown):
                self._write(line)
        self._error = error

    def _write_new_changes(self, panel: Panel, name: str) -> None:
        newest = max((change.revision for change in panel.changes), default=0)
        last = self._revisions.get(panel.title, newest)  # what was before the first look is no news
        self._revisions[panel.title] = newest
        if newest < last:
            last = 0  # another server, which counts anew
        for change in reversed(panel.changes):
            if change.revision > last:
                self._write(f"{name}{change.move} {change.outcome} in {change.took} ({change.why})")

    def _write(self, line: str) -> None:
        sys.stdout.write(f"{self._clock()}  {plain(line)}\n")
        sys.stdout.flush()


def watch(url: str, interval_s: float, view: View, fetch: Fetch = fetch_status) -> int:
    """Show the server until somebody presses Ctrl-C; return the exit status.

    Raises:
        NoStatus: there is none at the first look.
    """
    shown, error, seen_s = panels(fetch(url)), "", time.monotonic()
    try:
        with _interrupted() as is_interrupted, view:
            while not is_interrupted():
                now_s = time.monotonic()
                view.show(shown, error, now_s - seen_s)
                time.sleep(interval_s)
                try:
                    shown, error = panels(fetch(url)), ""
                    seen_s = time.monotonic()
                except NoStatus as e:
                    error = str(e)
    except KeyboardInterrupt:
        pass
    return 1 if error else 0


@contextmanager
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Yield what says whether somebody has pressed Ctrl-C: Python drops its exception in a finalizer or a callback."""
    pressed: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def main(argv: Sequence[str] | None = None, prog: str = "morphserve watch") -> int:
    """Watch a server until Ctrl-C."""
    parser = command_parser(__doc__, prog)
    add_server(parser)
    parser.add_argument("--interval", type=number, default=1.0, metavar="S", help="seconds between two looks")
    args = parser.parse_args(argv)
    if not 0.1 <= args.interval <= 3600:
        parser.error(f"--interval is {args.interval:g} s, must be from 0.1 to 3600.")
    try:
        return watch(args.url, args.interval, make_view(), partial(fetch_status, token_file=args.token_file))
    except NoStatus as e:
        sys.stderr.write(f"{prog}: {e}\n")
        return 1
    except KeyboardInterrupt:  # before the first look was over
        return 1
    except BrokenPipeError:  # whoever read our lines has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def make_view() -> View:
    """Return the screen where there is one, else lines."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "") in ("", "dumb"):
        return LineView()
    try:
        from morphserve.tools.watch.screen import ScreenView
    except ModuleNotFoundError:
        sys.stderr.write("morphserve watch: without rich there is a line an interval; pip install 'morphserve[ops]'\n")
        return LineView()
    return ScreenView()
