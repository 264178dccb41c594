"""What requests do, told to the monitor as it happens, and read from the scheduler at a step boundary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from morphserve.controller.ports import EngineView
from morphserve.monitor import Monitor


class Traffic:
    """Constant cost per event; a step costs what is new in it, and those that still wait for a first token.

    vLLM stamps arrivals with the wall clock, the monitor's own is monotonic.
    """

    def __init__(self, scheduler: Any, monitor: Monitor) -> None:
        self._scheduler = scheduler
        self._monitor = monitor
        self._awaiting_first_token: list[Any] = []
        self._last_preemption_wall_s = 0.0

    def view(self) -> EngineView:
        """The queues as they are now."""
        num_running, num_waiting = self._scheduler.get_request_counts()
        waiting = self._scheduler.waiting
        oldest = 0.0
        if len(waiting):
            head = waiting.peek_request()
            # A preempted request is put back at the head with the arrival time it always had; what it
            # waits for began when it was preempted.
            since = self._last_preemption_wall_s if head.num_preemptions else head.arrival_time
            oldest = max(0.0, time.time() - since)
        return EngineView(num_waiting, num_running, oldest)

    def on_arrival(self) -> None:
        """A request entered the waiting queue."""
        self._monitor.on_arrival(time.monotonic())

    def on_scheduled(self, new: Sequence[Any]) -> None:
        """Requests (`NewRequestData`) were scheduled for the first time."""
        now, wall = time.monotonic(), time.time()
        for data in new:
            request = self._scheduler.requests.get(data.req_id)
            if request is not None:
                self._monitor.on_scheduled(now, max(0.0, wall - request.arrival_time))
                self._awaiting_first_token.append(request)

    def on_step(self, num_tokens: int) -> None:
        """The requests have got the tokens of a step, so many of them."""
        self._monitor.on_step(time.monotonic(), num_tokens)
        if not self._awaiting_first_token:
            return
        wall = time.time()
        still: list[Any] = []
        for request in self._awaiting_first_token:
            if request.num_output_tokens > 0:
                self._monitor.on_first_token(max(0.0, wall - request.arrival_time))
            elif not request.is_finished():
                still.append(request)
        self._awaiting_first_token = still

    def on_preemption(self) -> None:
        """A running request lost its blocks."""
        self._last_preemption_wall_s = time.time()
        self._monitor.on_preemption(time.monotonic())

    def on_finish(self, request: Any) -> None:
        """A request ends; its blocks are still its own."""
        num_blocks = sum(map(len, self._scheduler.kv_cache_manager.get_block_ids(request.request_id)))
        self._monitor.on_finish(num_blocks, time.monotonic())
