"""What a set-up asks of the machine before it writes anything: a Python, room on the disk, nobody else at work.

Used by bootstrap.py and demo_model.py; standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from morphserve.setup.pip_progress import GIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    # Runs a command and gives exit code and output. The tests pass a fake.
    Runner = Callable[[list[str]], tuple[int, str]]

OLDEST, NEWEST = (3, 11), (3, 13)
LOCKS: list[int] = []  # held by our children, too: pip may outlive a set-up that is killed


class SetupError(Exception):
    """The machine cannot be set up; the message says what is missing and what to do."""


def run_quiet(command: list[str]) -> tuple[int, str]:
    """Run a command without a terminal; stdout and stderr together."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", check=False, pass_fds=tuple(LOCKS),
    )  # fmt: skip
    return done.returncode, done.stdout


def find_python(run: Runner, version: tuple[int, ...] | None = None) -> str:
    """Return an interpreter that vLLM has wheels for: this one, else one found on PATH.

    Raises:
        SetupError: none between OLDEST and NEWEST.
    """
    running = version if version is not None else sys.version_info[:2]
    if OLDEST <= running <= NEWEST:
        return sys.executable
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        candidate = shutil.which(f"python3.{minor}")
        # A version switcher leaves commands on PATH that only print an error: try it.
        if candidate and run([candidate, "-c", "import venv, ensurepip"])[0] == 0:
            return candidate
    raise SetupError(
        f"python3 is {running[0]}.{running[1]}, and no python{OLDEST[0]}.{OLDEST[1]} to "
        f"python{NEWEST[0]}.{NEWEST[1]} is on PATH; vLLM needs one of these. Install one, then run again "
        "with `make PYTHON=/path/to/python3.11 ...`."
    )


def check_disk(where: Path, needed: int, purpose: str, remedy: str) -> None:
    """Refuse before hundreds of megabytes are written, not after.

    Raises:
        SetupError: fewer than `needed` bytes free on the file system that will hold `where`.
    """
    existing = where
    while not existing.exists():
        existing = existing.parent
    available = shutil.disk_usage(existing).free
    if available < needed:
        raise SetupError(
            f"too little disk for {purpose}: needs {needed / GIB:.1f} GiB, "
            f"free are {available / GIB:.1f} GiB at {where}. {remedy}"
        )


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Two makes at once: the second waits.

    The lock ends with the process and with what it has started: the pip of a set-up that was killed goes on, and
    nobody else may write meanwhile.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fd = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process works in {directory}; waiting until it has ended")
            fcntl.flock(fd, fcntl.LOCK_EX)
        LOCKS.append(fd)
        yield
    finally:
        if fd in LOCKS:
            LOCKS.remove(fd)
        os.close(fd)


def say(text: str) -> None:
    """Progress goes to stderr: stdout ends with the JSON document."""
    sys.stderr.write(f"set-up: {text}\n")
    sys.stderr.flush()
