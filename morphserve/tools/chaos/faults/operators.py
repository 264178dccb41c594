"""What operators and vLLM's own routes order in the middle of a transition."""

from __future__ import annotations

import asyncio
import json

from morphserve.tools.chaos.stage import BURST_S, Stage

_NUM_PAUSES = 4


async def resets(stage: Stage) -> None:
    """Reset the prefix cache in the way down and in the way back, with and without those who run."""
    for i in range(6):
        await stage.in_transition()
        await stage.post(f"/reset_prefix_cache?reset_running_requests={'true' if i % 2 else 'false'}", None)


async def pauses(stage: Stage) -> None:
    """Pause morphing, and vLLM's scheduler, in the way down and in the way back, and reset the cache there."""
    for _ in range(_NUM_PAUSES):
        await stage.in_transition()
        await stage.order("pause", for_s=30.0)
        await _must(stage, "/pause?mode=keep")
        await stage.post("/reset_prefix_cache?reset_running_requests=true", None)
        await asyncio.sleep(1.0)
        await _must(stage, "/resume")
        await stage.order("resume")


async def drains(stage: Stage) -> None:
    """Drain the server in a transition, pause it in mid-drain, pin and restore it, drain it to the end, let it go."""
    await stage.above_level_0()
    await stage.order("drain")
    await stage.order("pause", for_s=30.0)
    await asyncio.sleep(1.0)
    await stage.order("pin", level="deepest", for_s=30.0)
    await asyncio.sleep(1.0)
    await stage.order("restore")
    await stage.order("drain")
    is_drained = False
    for _ in range(int(BURST_S)):
        _, text = await stage.get("/morphserve/admin/state")
        if is_drained := all(engine["drained"] for engine in json.loads(text)["engines"]):
            break
        await asyncio.sleep(1.0)
    await stage.order("resume")
    if not is_drained:
        raise AssertionError(f"not drained after {BURST_S:.0f} s")


async def _must(stage: Stage, path: str) -> None:
    code, text = await stage.post(path, None)
    if code != 200:
        raise AssertionError(f"POST {path} is answered with {code}: {text[:200]}")
