"""What a server or a script that ends because its engine did says at its end: the cause, in our words.

The engine core and its workers are processes of their own; vLLM's front process learns only that they are
gone. So they write what ended them into a file that the front process made and named in the environment.
They hear of it as a log handler does: vLLM logs the exception that ends a process. The front process says
it: a command as the last thing of all, a script when Python has printed what ended it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from morphserve.endings import PREFIX, Problem, first_cause, sentence
from morphserve.errors import EngineEndedError, MorphServeError
from morphserve.integration import seams

_FILE = "MORPHSERVE_ENDING_FILE"  # set by the front process for its children; no option for users
# Functions of vLLM that log what ends their process; the last one what it saw of another's end.
_FATAL_FUNCTIONS = ("worker_main", "run_engine_core", "monitor_workers")

logger = logging.getLogger("vllm.morphserve")


class _Recorder(logging.Handler):
    """Writes down the exceptions with which vLLM says that a process ends."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.funcName not in _FATAL_FUNCTIONS:
            return
        with contextlib.suppress(Exception):  # of a message that cannot be formatted
            error = record.exc_info[1] if record.exc_info else None
            note(error if error is not None else record.getMessage())


_RECORDER = _Recorder(logging.ERROR)
_front_pid: int | None = None  # of the process that made the file; a forked child inherits this, and is another


def arm(is_cli: bool) -> None:
    """Make the file and listen, in the front process, once somebody has asked for MorphServe. Re-entrant.

    Args:
        is_cli: the process is a command of vLLM's.
    """
    global _front_pid
    if _FILE in os.environ and multiprocessing.parent_process() is not None:
        listen()  # one of several API servers: the process above them is the front
        return
    try:
        if _front_pid != os.getpid() or _FILE not in os.environ:
            handle, os.environ[_FILE] = tempfile.mkstemp(prefix="morphserve-ending-")
            os.close(handle)
            _front_pid = os.getpid()
            atexit.register(_say_last, _front_pid, Path(os.environ[_FILE]), is_cli)
            if is_cli:
                # Python's resource tracker ends after us; what it cleaned up would be the last that the user reads.
                sys.warnoptions.append("ignore:resource_tracker")
        Path(os.environ[_FILE]).write_bytes(b"")  # of an earlier engine of this process
    except OSError as e:
        os.environ.pop(_FILE, None)  # somebody else's, or of no use
        logger.warning("morphserve: no temporary file (%s); why an engine ended will stand only in the log", e)
        return
    listen()
    seams.wrap(seams.ENGINE_START, _cli_with_cause if is_cli else _with_cause)
    seams.wrap(seams.CORE_LIVENESS, _with_killed_core)
    if is_cli:
        seams.wrap(seams.SERVE_HTTP, _with_status)


def listen() -> None:
    """Write down what ends a process, in every one of an armed server. Re-entrant."""
    if _FILE in os.environ:
        logging.getLogger("vllm").addHandler(_RECORDER)


def install() -> None:
    """Make the engine core's own exception name what ended a worker. Re-entrant."""
    seams.wrap(seams.WORKER_START, _static_with_cause)


def note(error: BaseException | str) -> None:
    """Write a cause into the file, if there is one. Never raises: whoever calls has an error to handle."""
    file = os.environ.get(_FILE)
    if file is None:
        return
    with contextlib.suppress(Exception):
        problem = Problem("", error) if isinstance(error, str) else _problem(error)
        # In one write, so that those of several processes do not mix; the line end before it ends what was cut off.
        record = f"\n{json.dumps([problem.kind, problem.said])}\n".encode()
        # /tmp is everybody's, and cleaned by some systems while a server runs: a link there is somebody else's.
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.write(descriptor, record)
        finally:
            os.close(descriptor)


def cause() -> str | None:
    """Return in one sentence what this server's processes have written down so far; None = nothing that says why."""
    return first_cause(_noted())


def _noted() -> Iterator[Problem]:
    try:
        lines = Path(os.environ[_FILE]).read_bytes().splitlines()
    except (KeyError, OSError):
        return
    for line in lines:
        try:
            kind, said = json.loads(line)
        except (ValueError, TypeError):  # cut off where its writer was killed or the disk was full
            continue
        if isinstance(kind, str) and isinstance(said, str):
            yield Problem(kind, said)


def _with_cause(original: Callable[..., Any]) -> Any:
    """Around a function by which one process waits for others: its error says the cause, not that there is one."""

    @functools.wraps(original)
    def wait(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except Exception as e:
            found = cause() or first_cause([_problem(e)])
            if found is None or _FILE not in os.environ:
                raise
            raise EngineEndedError(sentence(found)) from e

    return wait


def _with_killed_core(original: Callable[..., Any]) -> Any:
    """Around what waits for an engine core's end: one that was killed has left no word, and vLLM says no code."""

    @functools.wraps(original)
    def wait(manager: Any) -> Any:
        try:
            return original(manager)
        finally:
            name = manager.failed_proc_name  # who ended first, unless the server was asked to
            codes = [process.exitcode for process in manager.processes if process.name == name]
            if codes:
                note(f"Proc {name} died unexpectedly (exit code: {codes[0]})")  # behind what it said itself

    return wait


def _with_status(original: Callable[..., Any]) -> Any:
    """Around what serves until the end: a lone API server says by its status, too, that its engine has died.

    Of several, vLLM's own process above them does.
    """

    @functools.wraps(original)
    async def serve(*args: Any, **kwargs: Any) -> Any:
        rest = await original(*args, **kwargs)  # awaited once the engine is shut down

        async def end() -> None:
            await rest
            if cause() is not None:
                raise SystemExit(1)

        return end()

    return serve


def _static_with_cause(original: Callable[..., Any]) -> Any:
    return staticmethod(_with_cause(original))


def _cli_with_cause(original: Callable[..., Any]) -> Any:
    """Wrap a command alike: the line at its end says why, a stack of the front process says nothing."""
    wait = _with_cause(original)

    @functools.wraps(original)
    def wait_or_end(*args: Any, **kwargs: Any) -> Any:
        try:
            return wait(*args, **kwargs)
        except EngineEndedError as e:
            note(e)
            raise SystemExit(1) from e

    return wait_or_end


def _problem(error: BaseException) -> Problem:
    cls, said = type(error), ""
    with contextlib.suppress(Exception):  # of a __str__
        said = str(error)
    return Problem(cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}", said)


def _is_of_engine(error: BaseException | None) -> bool:
    """Return whether an exception, or one that led to it, is an engine's end: a script may have survived that, and
    die later of something else."""
    noted, seen = set(_noted()), set()
    dead = getattr(sys.modules.get("vllm.v1.engine.exceptions"), "EngineDeadError", EngineEndedError)
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        if isinstance(one, EngineEndedError | dead) or _problem(one) in noted:
            return True
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
    return False


def _say_last(pid: int, file: Path, is_cli: bool) -> None:
    """Say it at the end of the front process."""
    if os.getpid() != pid:
        return
    unhandled = getattr(sys, "last_value", None)
    found = cause() if is_cli or _is_of_engine(unhandled) else None
    with contextlib.suppress(OSError):
        file.unlink()
    if found is None:
        return
    sys.stdout.flush()
    if not isinstance(unhandled, MorphServeError):  # else Python has just printed the message
        sys.stderr.write(f"{PREFIX}{sentence(found)}\n")
    sys.stderr.flush()
    if not is_cli:
        return  # what else a script says at its end is the user's
    # The interpreter is not done: libraries count what it leaks, on the descriptor itself, below our line.
    with open(os.devnull, "w") as nowhere:
        for descriptor in (1, 2):
            os.dup2(nowhere.fileno(), descriptor)
