"""A system that gives no memory, takes none back, has no disk left, or sets its clock."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

from morphserve.tools.chaos import processes
from morphserve.tools.chaos.stage import FROZEN_S, Stage

_MIB = 1 << 20
_HOUR_S = 3600


async def small_files(stage: Stage) -> None:
    """Let no process write to files any more, as on a full disk, and leave the YAML as an editor does there: empty."""
    was = stage.config.read_text(encoding="utf-8")
    stage.config.write_text("", encoding="utf-8")
    try:
        await _limited(stage, resource.RLIMIT_FSIZE, 0)
    finally:
        stage.config.write_text(was, encoding="utf-8")


async def no_more_memory(stage: Stage) -> None:
    """Let the ranks take a little memory more than they have, and no more, for a while."""
    await _limited(stage, resource.RLIMIT_DATA, None)


async def _limited(stage: Stage, what: int, value: int | None) -> None:
    """Lower a limit of core and ranks; None = to what the process has now and 64 MiB."""
    pids = {*processes.with_title(stage.pid, processes.CORE), *processes.ranks(stage.pid)}
    before = {pid: resource.prlimit(pid, what) for pid in pids}
    for pid, (_, hard) in before.items():
        resource.prlimit(pid, what, (_data_bytes(pid) + 64 * _MIB if value is None else value, hard))
    try:
        await stage.in_transition()
        await asyncio.sleep(FROZEN_S)
    finally:
        for pid, limits in before.items():
            resource.prlimit(pid, what, limits)


def _data_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/status has no VmData")


async def failing_release(stage: Stage) -> None:
    """Let the system refuse to take memory back, for a while."""
    await _refusing(stage, "no-release")


async def failing_populate(stage: Stage) -> None:
    """Let the system refuse memory for more KV, for a while."""
    await _refusing(stage, "no-populate")


async def failing_mmap(stage: Stage) -> None:
    """Let the system refuse memory for layers that are read in, for a while."""
    await _refusing(stage, "no-mmap")


async def _refusing(stage: Stage, how: str) -> None:
    with stage.broken(how):
        await stage.met()
        await asyncio.sleep(FROZEN_S)


async def clock_jumps(stage: Stage) -> None:
    """Set the clock of all of the server's processes on by an hour, back, back by an hour, and right again."""
    for hours in (1, -1):
        await stage.in_transition()
        with stage.broken(f"clock {hours * _HOUR_S}"):
            await asyncio.sleep(FROZEN_S)
