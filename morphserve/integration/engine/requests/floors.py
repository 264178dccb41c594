"""Requests that must not be served below a level of their own: `morphserve_max_level` in `vllm_xargs`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from morphserve.integration.engine.block_pool import VllmBlockPool
from morphserve.integration.engine.requests.traffic import Traffic
from policies import Floors

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.morphserve")

MAX_LEVEL_ARG = "morphserve_max_level"
KEY_ARG = "morphserve_key"  # whose request it is: the API server's word, never the client's


class FloorGate:
    """Keeps them out of vLLM's queue while the engine is below their level, or about to be.

    The policy knows that they are here, and goes no deeper as long as its budget lasts. When it does all the same they
    are preempted, and wait here. A step costs one comparison; a change of the level a look at all that are here.
    """

    def __init__(self, scheduler: Scheduler, traffic: Traffic, pool: VllmBlockPool, floors: Floors) -> None:
        """Be open, at level 0. `floors`: who may ask for what; may be replaced at any time."""
        self.floors = floors
        self._scheduler = scheduler
        self._traffic = traffic
        self._pool = pool
        self._level = 0
        self._levels: dict[str, tuple[Request, int]] = {}  # those that are here: request id |-> request, its level
        self._held: dict[str, Request] = {}  # those of them that wait here, in the order in which they came
        self._has_warned = False
        self.has_news = False  # the policy has not been asked since somebody began to wait here

    @property
    def num_held(self) -> int:
        """Requests that wait for another level."""
        return len(self._held)

    def on_arrival(self, request: Request) -> bool:
        """Take in a request that has entered vLLM's queue; return whether it waits here instead."""
        level = self._level_of(request)
        if level is None or request.request_id in self._levels:
            return False
        self._levels[request.request_id] = (request, level)
        self._traffic.on_floor(level, 1)
        if level >= self._level:
            return False
        self._hold([request])
        return True

    def on_finish(self, request: Request) -> None:
        """Forget a request that ends, wherever it waits."""
        known = self._levels.pop(request.request_id, None)
        if known is not None:
            self._held.pop(request.request_id, None)
            self._traffic.on_floor(known[1], -1)

    def enforce(self, level: int) -> None:
        """Let those in that may run at `level`, and take those out that may not.

        Call it before vLLM schedules, and after the policy was asked.
        """
        self.has_news = False
        if level == self._level:
            return
        is_deeper, self._level = level > self._level, level
        if is_deeper:
            here = [request for request, own in self._levels.values() if own < level]
            self._take_out([request for request in here if request.request_id not in self._held])
        elif self._held:
            self._let_in([request for request in self._held.values() if self._levels[request.request_id][1] >= level])

    def open(self) -> None:
        """Let all in, for good: nobody decides on levels any more."""
        self._level = -1
        if self._held:
            self._let_in(list(self._held.values()))

    def _let_in(self, requests: Sequence[Request]) -> None:
        """Put them into vLLM's queue first: whatever comes of the rest, none is lost."""
        for request in requests:
            del self._held[request.request_id]
        # They have waited longest; vLLM's queue puts them in front one by one.
        self._scheduler.waiting.prepend_requests(request for request in reversed(requests) if not request.is_finished())
        for request in requests:
            self._traffic.on_let_in(request)

    def _take_out(self, requests: Sequence[Request]) -> None:
        running = set(self._scheduler.running)
        for request in requests:
            if request in running:
                self._pool.send_back(request)
        self._hold(requests)

    def _hold(self, requests: Sequence[Request]) -> None:
        self._scheduler.waiting.remove_requests(requests)
        self._held.update((request.request_id, request) for request in requests)
        self.has_news = bool(requests)
        for request in requests:
            self._traffic.on_held(request)

    def _level_of(self, request: Request) -> int | None:
        asked: Any = getattr(getattr(request, "sampling_params", None), "extra_args", None)
        if not asked or MAX_LEVEL_ARG not in asked or request.resumable:  # a session is here between its turns, too
            return None
        adapter = getattr(request, "lora_request", None)
        try:
            name = None if adapter is None else adapter.lora_name
            return self.floors.level_of(asked[MAX_LEVEL_ARG], name, asked.get(KEY_ARG))
        except (ValueError, TypeError) as e:  # in-process nobody has looked at the types
            level = logging.DEBUG if self._has_warned else logging.WARNING  # clients may send as many as they like
            logger.log(level, "morphserve: request %.80r: %s: %s", request.request_id, MAX_LEVEL_ARG, e)
            self._has_warned = True
            return None
