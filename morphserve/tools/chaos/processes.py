"""The processes of a server: which there are, which is which, and what became of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

CORE, WORKER = "VLLM::EngineCore", "VLLM::Worker"  # the titles that vLLM gives its processes
# Ends by itself a moment after the process it belongs to.
_TRACKER = "multiprocessing.resource_tracker"


def command_lines(session: int) -> dict[int, str]:
    """Return the living processes of a session, by id, with their command lines or titles.

    Processes that have given up their memory, command line included, are as good as gone.
    """
    found = {}
    for pid, stat in _stats():
        state, _, _, own_session = stat.rpartition(")")[2].split()[:4]
        if int(own_session) == session and state != "Z":
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if line.strip() and _TRACKER not in line:
                    found[pid] = line.strip()
    return found


def with_title(session: int, title: str) -> list[int]:
    """Return the processes of a session whose title begins so."""
    return [pid for pid, line in command_lines(session).items() if line.startswith(title)]


def ranks(session: int) -> list[int]:
    """Return the processes that hold weights: the workers, or the engine core where it is its own worker."""
    return with_title(session, WORKER) or with_title(session, CORE)


def has_ended(pid: int) -> bool:
    """Say whether a child of this process runs no more."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def send(pids: list[int], signum: int) -> None:
    """Signal processes; one that is gone is left alone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _stats() -> Iterator[tuple[int, str]]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            yield int(stat.parent.name), stat.read_text(encoding="utf-8", errors="replace")
