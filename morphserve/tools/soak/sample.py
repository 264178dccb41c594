"""What the processes of a server take, as the kernel says."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from morphserve.tools.chaos import CORE, WORKER, command_lines

_TICK = os.sysconf("SC_CLK_TCK")
_MEMORY = {"Rss": "rss_kib", "Pss": "pss_kib", "Anonymous": "anonymous_kib"}  # of smaps_rollup


@dataclass(frozen=True, slots=True)
class Usage:
    """One process at one moment."""

    role: str  # api, core, rank, or other
    pid: int
    rss_kib: int
    pss_kib: int
    anonymous_kib: int
    num_fds: int
    num_threads: int
    cpu_s: float  # since its start

    def as_json(self) -> dict[str, Any]:
        """Return it as a row."""
        return asdict(self)


def usage_of(server: int) -> list[Usage]:
    """Return what the processes of a server take, the API server's first.

    Args:
        server: process id of the API server, and of its session.
    """
    found = []
    for pid, line in sorted(command_lines(server).items()):
        try:
            found.append(_usage(_role(pid, server, line), pid))
        except (OSError, ValueError):  # it has just ended
            continue
    return found


def _role(pid: int, server: int, line: str) -> str:
    if pid == server:
        return "api"
    if line.startswith(CORE):
        return "core"
    return "rank" if line.startswith(WORKER) else "other"


def _usage(role: str, pid: int) -> Usage:
    process = Path(f"/proc/{pid}")
    memory = dict.fromkeys(_MEMORY.values(), 0)
    for line in (process / "smaps_rollup").read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(":")
        if name in _MEMORY:
            memory[_MEMORY[name]] = int(rest.split()[0])
    stat = (process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return Usage(
        role=role, pid=pid, num_fds=len(os.listdir(process / "fd")), num_threads=int(stat[17]),
        cpu_s=(int(stat[11]) + int(stat[12])) / _TICK, **memory,
    )  # fmt: skip
