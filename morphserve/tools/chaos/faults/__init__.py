"""What is done to a server from outside, while it morphs.

Each fault takes a `Stage` and returns when the server is again as it should be, but for what it must recover from
itself: `clients` behave badly, `signals` stop and end processes, `files` are damaged and disks away, the `system`
refuses memory and sets clocks, `operators` order.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from morphserve.tools.chaos.stage import Stage

Fault = Callable[[Stage], Awaitable[None]]


async def nothing(stage: Stage) -> None:
    """Leave it alone: what the load itself does."""
    await stage.in_transition()


__all__ = ["Fault", "nothing"]
