"""Requests that must not be served below a level of their own, as the engine's `FloorGate` treats them."""

from __future__ import annotations

from collections.abc import Callable

from morphserve.control import Monitor
from morphserve.tools.sim.request import SimRequest
from morphserve.tools.sim.scheduler import SimScheduler


class SimGate:
    """Keeps them out of the scheduler's queue while the engine is below their level, or about to be."""

    def __init__(self, monitor: Monitor, let_in: Callable[[SimRequest], None]) -> None:
        """Be open, at level 0. `let_in`: told of those that wait for a level no more."""
        self._monitor = monitor
        self._tell_let_in = let_in
        self._level = 0
        self._here: dict[SimRequest, int] = {}
        self._held: dict[SimRequest, None] = {}  # in the order in which they came

    def on_arrival(self, scheduler: SimScheduler, request: SimRequest) -> bool:
        """Take in a request that has entered the queue; return whether it waits here instead."""
        if request.max_level is None:
            return False
        self._here[request] = request.max_level
        self._monitor.on_floor(request.max_level, 1)
        if request.max_level >= self._level:
            return False
        self._hold(scheduler, request, has_arrived=False)
        return True

    def on_finish(self, request: SimRequest) -> None:
        """Forget a request that ends."""
        level = self._here.pop(request, None)
        if level is not None:
            self._held.pop(request, None)
            self._monitor.on_floor(level, -1)

    def is_held(self, request: SimRequest) -> bool:
        """Return whether a request waits here."""
        return request in self._held

    def enforce(self, scheduler: SimScheduler, level: int) -> None:
        """Let those in that may run at `level`, and take those out that may not."""
        if level == self._level:
            return
        is_deeper, self._level = level > self._level, level
        if is_deeper:
            for request, own in self._here.items():
                if own < level and request not in self._held:
                    scheduler.send_back(request)
                    self._hold(scheduler, request, has_arrived=True)
            return
        ready = [request for request in self._held if self._here[request] >= level]
        for request in ready:
            del self._held[request]
            self._tell_let_in(request)
        scheduler.waiting.extendleft(reversed(ready))

    def _hold(self, scheduler: SimScheduler, request: SimRequest, has_arrived: bool) -> None:
        scheduler.waiting.remove(request)
        self._monitor.on_held(request.name, has_arrived)
        self._held[request] = None
