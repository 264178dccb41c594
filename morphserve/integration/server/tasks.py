"""What goes on in an API server of ours beside its requests. The event loop itself keeps no task alive."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Tasks(set[asyncio.Task[None]]):
    """The owner of all such tasks: each is held until it has ended."""

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin one, in the loop that runs."""
        task = asyncio.create_task(work)
        self.add(task)
        task.add_done_callback(self.discard)
