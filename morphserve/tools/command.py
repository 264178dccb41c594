"""What the command lines have in common: --help is the docstring, the last line a JSON document, an error one line."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from morphserve.endings import one_line
from morphserve.errors import MorphServeError


def command_parser(doc: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser whose --help shows a command's docstring as it is written, and that takes whole options alone."""
    return argparse.ArgumentParser(
        prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def say(line: str) -> None:
    """Write a line to stdout at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def finish(document: Any) -> int:
    """Write a command's last line, and return its exit status."""
    say(json.dumps(document))
    return 0


def fail(name: str, error: object) -> int:
    """Say on stderr, in one line, what the user can repair, and return a command's exit status."""
    sys.stderr.write(f"{name}: {one_line(str(error))}\n")
    return 1


def run_command(name: str, job: Callable[[], dict[str, Any]], when_interrupted: str) -> int:
    """Do the job; its document is the last line on stdout.

    Args:
        name: of the command, before its messages.
        when_interrupted: what became of its work, after Ctrl-C, SIGTERM or SIGHUP.

    Returns:
        The exit status: 1 after an error that the user can repair, 130 when interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    end_as_interrupted()
    try:
        document = job()
    except MorphServeError as e:
        sys.stderr.write(f"{name}: {one_line(str(e))}\n")
        return 1
    except OSError as e:  # of a file of the user's, or a full disk: the message names it
        sys.stderr.write(f"{name}: {e}. Finished runs are kept; run again when that is repaired.\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted; {when_interrupted}\n")
        return 130
    sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")
    return 0


def end_as_interrupted() -> None:
    """End on SIGTERM and SIGHUP as on Ctrl-C, so that what this process has started ends, too.

    Does nothing in other threads than the main one, where no handler can be set.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup sets SIGHUP
            signal.signal(signum, _terminated)


def _terminated(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
