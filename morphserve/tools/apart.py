"""Commands that run an engine, in a process of their own: its ranks, how far it is, what came of it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from morphserve.endings import cause_in
from morphserve.errors import ProfilingError
from morphserve.tools.checks import at_least
from morphserve.tools.children import with_us

Progress = Callable[[str, int, int], Any]  # what, done, of how many
_MARK = "progress"
_BIND = "VLLM_CPU_OMP_THREADS_BIND"
_LOG_LINES = 1000


def add_parallel_options(parser: Any) -> None:
    """Add the ranks of the engine."""
    for flags in (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp")):
        parser.add_argument(*flags, type=at_least(1), default=1, metavar="N", help="as the server has it")


def parallel_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return arguments of `vllm.LLM`."""
    found = {key: getattr(args, key) for key in ("tensor_parallel_size", "pipeline_parallel_size")}
    return found | ({"distributed_executor_backend": "mp"} if max(found.values()) > 1 else {})


def add_bind_option(parser: Any) -> None:
    """Add the cores of the engine."""
    parser.add_argument(
        "--cpu-bind", metavar="CORES", help=f"cores of each rank, as the server's; default: {_BIND}, else vLLM's choice"
    )


def bind_cores(args: argparse.Namespace) -> str:
    """Let engines that start from now on have the cores that were asked for, and return these as vLLM reads them."""
    if args.cpu_bind is not None:
        os.environ[_BIND] = args.cpu_bind
    return os.environ.get(_BIND) or "auto"


def counter(total: int) -> Callable[[], None]:
    """Return what says on stdout, each time that it is called, how many of `total` are done."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        sys.stdout.write(f"{_MARK} {done} {total}\n")
        sys.stdout.flush()

    return count


def run_apart(command: Sequence[str], failed: str, what: str, progress: Progress) -> dict[str, Any]:
    """Run a command, pass on how far it says it is, and return the JSON document of its last line.

    Args:
        command: its words.
        failed: what did not work, in words.
        what: it does, for `progress`.
        progress: hears of it.

    Raises:
        ProfilingError: it failed, with the cause; or it ended well without a document.
    """
    environment = os.environ | {"PYTHONSAFEPATH": "1"}  # nothing is imported from where somebody happens to stand
    last, log = "", deque[str](maxlen=_LOG_LINES)  # vLLM logs to stdout, and its stacks go to stderr
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, preexec_fn=with_us()
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                words = line.split()
                if len(words) == 3 and words[0] == _MARK:
                    progress(what, int(words[1]), int(words[2]))
                elif line.startswith("{"):
                    last = line
                else:
                    log.append(line)
        except BaseException:
            process.terminate()  # vLLM ends its own processes then
            raise
        code = process.wait()
        errors.seek(0)
        said = errors.read()
    if code:
        cause = cause_in("".join(log) + said) or said.strip()[-500:] or f"exit code {code}"
        raise ProfilingError(f"{failed} (vLLM said: {cause}).")
    try:
        document: dict[str, Any] = json.loads(last)
    except ValueError as e:
        said = said.strip()[-500:] or "nothing"
        raise ProfilingError(f"{failed}: {command[0]} ended without an answer (it said: {said}). Try again.") from e
    return document
