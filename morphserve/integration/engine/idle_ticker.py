"""Steps for an engine that has none of its own: vLLM's loop sleeps when idle."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from morphserve.integration.spared import Spared

WAKE_INTERVAL_S = 0.1  # how often an idle engine above level 0 makes a step of its own


class IdleTicker:
    """A thread that asks `claims_step` at every interval, and wakes the engine whenever it says yes.

    What it asks is another thread's: an error costs one wake-up, and the next interval asks again.
    """

    def __init__(self, input_queue: Any, claims_step: Callable[[], bool]) -> None:
        self._input_queue = input_queue  # of vLLM's `EngineCoreProc`
        self._claims_step = claims_step
        self._stop = threading.Event()
        threading.Thread(target=self._loop, name="morphserve-wake", daemon=True).start()

    def close(self) -> None:
        """Stop: no wake-up after the one that may be under way. Re-entrant."""
        self._stop.set()

    def _loop(self) -> None:
        from vllm.v1.engine import EngineCoreRequestType

        spared = Spared("a wake-up of the idle engine")
        while not self._stop.wait(WAKE_INTERVAL_S):
            with spared:
                if self._claims_step():
                    self._input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
