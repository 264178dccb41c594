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
MODEL_ARG = "morphserve_model"  # what he has named as its model: likewise


class FloorGate:
    """Keeps them out of vLLM's queue while the engine is below their level, or about to be.

    The policy knows that they are here, and goes no deeper as long as its budget lasts. When it does all the same they
    are preempted, and wait here. Of a session only its turns count: between two of them nobody waits for a token.
    A step costs three comparisons; a change of the level or of the rules one look at all that are here, as does a step
    before which some have come that must wait, however many.
    """

    def __init__(self, scheduler: Scheduler, traffic: Traffic, pool: VllmBlockPool, floors: Floors) -> None:
        """Be open, at level 0. `floors`: who may ask for what; may be replaced at any time."""
        self.floors = floors
        self._judged_by = floors  # those that are here
        self._scheduler = scheduler
        self._traffic = traffic
        self._pool = pool
        self._level = 0
        self._levels: dict[str, tuple[Request, int]] = {}  # those that are here: request id |-> request, its level
        self._held: dict[str, Request] = {}  # those of them that wait here, in the order in which they came
        self._leaving: set[Request] = set()  # of these, who is in one of vLLM's queues until the next step
        self._has_warned = False
        self.num_held_total = 0  # so far; who is sent back twice waits twice
        self.has_news = False  # the policy has not been asked since somebody began to wait here

    @property
    def num_held(self) -> int:
        """Requests that wait for another level."""
        return len(self._held)

    def for_door(self, min_floor: int) -> dict[str, Any]:
        """Return what the API server must know: little, unless it is to refuse those below `min_floor`."""
        levels = {"levels": self.floors.as_json()} if min_floor else {}
        return {"min_floor": min_floor, "heeds_models": bool(self.floors.by_model), **levels}

    def on_arrival(self, request: Request) -> bool:
        """Take in a request, or a turn, that enters vLLM's queue; return whether it waits here instead."""
        level = self._level_of(request)
        if level is None or request.request_id in self._levels:
            return False
        self._levels[request.request_id] = (request, level)
        self._traffic.on_floor(level, 1)
        if level >= self._level:
            return False
        self._hold([request], has_arrived=False)
        return True

    def on_finish(self, request: Request) -> None:
        """Forget a request or a turn that ends, wherever it waits."""
        known = self._levels.pop(request.request_id, None)
        if known is not None:
            self._held.pop(request.request_id, None)
            self._leaving.discard(request)
            self._traffic.on_floor(known[1], -1)

    def take_out(self) -> None:
        """Take out of vLLM's queues who waits here. Call it before anything is read of them."""
        if self._leaving:
            for queue in (self._scheduler.waiting, self._scheduler.kv_holding_waiting):  # the latter: turns of sessions
                queue.remove_requests(self._leaving)
            self._leaving = set()

    def enforce(self, level: int) -> None:
        """Let those in that may run at `level`, and take those out that may not.

        Call it before vLLM schedules, and after the policy was asked.
        """
        self.has_news = False
        if self._judged_by is not self.floors:
            self._judge_anew()
        if level == self._level:
            return
        is_deeper, self._level = level > self._level, level
        if is_deeper:
            running = set(self._scheduler.running)
            here = [request for request, own in self._levels.values() if own < level]
            sent_back = [request for request in here if request.request_id not in self._held]
            for request in sent_back:
                if request in running:
                    self._pool.send_back(request)
            self._hold(sent_back, has_arrived=True)
            self.take_out()
        elif self._held:
            self._let_in([request for request in self._held.values() if self._levels[request.request_id][1] >= level])

    def _judge_anew(self) -> None:
        """Let go of those whom a reload lets ask for less: nothing is held up for them any more."""
        self._judged_by = self.floors
        for request, own in list(self._levels.values()):
            level = self._level_of(request)
            if level is not None and level <= own:
                continue  # who might ask for more now came when he might not
            self._traffic.on_floor(own, -1)
            if level is None:
                del self._levels[request.request_id]
            else:
                self._levels[request.request_id] = (request, level)
                self._traffic.on_floor(level, 1)
        free = [r for name, r in self._held.items() if name not in self._levels or self._levels[name][1] >= self._level]
        if free:
            self._let_in(free)

    def open(self) -> None:
        """Let all in, for good: nobody decides on levels any more."""
        self._level = -1
        if self._held:
            self._let_in(list(self._held.values()))

    def _let_in(self, requests: Sequence[Request]) -> None:
        """Put them into vLLM's queues first: whatever comes of the rest, each waits there or here, and not in both."""
        self.take_out()
        for request in reversed(requests):  # They have waited longest: in front of the others, one by one.
            if not request.is_finished():
                holds_kv = request.num_computed_tokens > 0
                queue = self._scheduler.kv_holding_waiting if holds_kv else self._scheduler.waiting
                queue.prepend_request(request)
            del self._held[request.request_id]
        for request in requests:
            self._traffic.on_let_in(request)

    def _hold(self, requests: Sequence[Request], has_arrived: bool) -> None:
        self._held.update((request.request_id, request) for request in requests)
        self._leaving.update(requests)
        self.has_news = bool(requests)
        self.num_held_total += len(requests)
        for request in requests:
            self._traffic.on_held(request, has_arrived)

    def _level_of(self, request: Request) -> int | None:
        asked: Any = getattr(getattr(request, "sampling_params", None), "extra_args", None)
        if not asked or MAX_LEVEL_ARG not in asked:
            return None
        adapter = getattr(request, "lora_request", None)
        try:
            model = asked.get(MODEL_ARG) if adapter is None else adapter.lora_name
            return self.floors.level_of(asked[MAX_LEVEL_ARG], model, asked.get(KEY_ARG))
        except (ValueError, TypeError) as e:  # in-process nobody has looked at the types
            level = logging.DEBUG if self._has_warned else logging.WARNING  # clients may send as many as they like
            logger.log(level, "morphserve: request %.80r: %s: %s", request.request_id, MAX_LEVEL_ARG, e)
            self._has_warned = True
            return None
