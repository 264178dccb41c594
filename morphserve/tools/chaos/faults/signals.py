"""Processes that are stopped, killed, or told that their terminal is gone."""

from __future__ import annotations

import asyncio
import os
import signal

from morphserve.tools.chaos import processes
from morphserve.tools.chaos.load import until
from morphserve.tools.chaos.stage import BURST_S, FROZEN_S, Stage

_MOMENTS = ("read", "unmap", "map")  # PREPARING, SHRINKING and COMMITTING; a lone rank's are one command


async def frozen_rank(stage: Stage) -> None:
    """Stop a worker in a transition, twice, and let it go on."""
    await _frozen(stage, processes.ranks(stage.pid))


async def frozen_core(stage: Stage) -> None:
    """Stop the engine core in a transition, twice, and let it go on."""
    await _frozen(stage, processes.with_title(stage.pid, processes.CORE))


async def _frozen(stage: Stage, pids: list[int]) -> None:
    for _ in range(2):
        await stage.in_transition()
        processes.send(pids, signal.SIGSTOP)
        try:
            await asyncio.sleep(FROZEN_S)
        finally:
            processes.send(pids, signal.SIGCONT)


async def frozen_phases(stage: Stage) -> None:
    """Stop one rank while it reads layers, while it gives KV back, and while it takes memory for KV."""
    for moment in _MOMENTS:
        with stage.broken(f"stop-{moment}"):
            was_met = await until(lambda: not stage.break_file.exists(), BURST_S)
        try:
            await asyncio.sleep(FROZEN_S)
        finally:
            processes.send(processes.ranks(stage.pid), signal.SIGCONT)
        if not was_met:
            raise AssertionError(f"no rank came to {moment} within {BURST_S:.0f} s: nothing was stopped there")


async def killed_rank(stage: Stage) -> None:
    """Kill a worker in a transition."""
    await stage.in_transition()
    processes.send(processes.ranks(stage.pid)[:1], signal.SIGKILL)


async def killed_core(stage: Stage) -> None:
    """Kill the engine core in a transition."""
    await stage.in_transition()
    processes.send(processes.with_title(stage.pid, processes.CORE), signal.SIGKILL)


async def hangup(stage: Stage) -> None:
    """Close the terminal: SIGHUP to every process of the group."""
    await stage.in_transition()
    os.killpg(stage.pid, signal.SIGHUP)
    await asyncio.sleep(1.0)
