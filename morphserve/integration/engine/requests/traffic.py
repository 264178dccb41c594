"""What requests do, told to the monitor as it happens, and read from the scheduler at a step boundary."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import SchedulingPolicy

from morphserve.control import EngineView, Monitor, WaitingRequest
from morphserve.integration.engine.requests.request_limits import LateCount, limits_of
from policies import Promise

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that was sent, and the engine as it was then.

    Attributes:
        level: effective level.
        settled: neither a transition nor another step's prompt took a part of its time.
        used_blocks: that live requests held.
        num_tokens: scheduled; 0 = vLLM's filler between two steps of one batch, or after the last request.
        num_seqs: scheduled.
        since_s: when what it waited for had ended; None = the step that is read before it.
    """

    level: int
    settled: bool = False
    used_blocks: int = 0
    num_tokens: int = 0
    num_seqs: int = 0
    since_s: float | None = None


class Traffic:
    """Constant cost per event; a step costs what is new in it, and those that still wait for a first token.

    vLLM stamps arrivals with the wall clock, which may be set meanwhile. So a request's age is looked at once, when it
    comes here, and counts by the monotonic clock from then on, which is the monitor's own.
    """

    def __init__(self, scheduler: Scheduler, monitor: Monitor) -> None:
        self._scheduler = scheduler
        self._monitor = monitor
        self.late = LateCount(Promise())
        self._awaiting_first_token: dict[str, tuple[Any, float]] = {}  # by request id, with when it arrived
        self._arrived_s: dict[str, float] = {}  # live request |-> monotonic
        self._last_preemption_s = 0.0

    def view(self) -> EngineView:
        """Return the queues as they are now."""
        num_running, num_waiting = self._scheduler.get_request_counts()
        num_waiting -= self._scheduler.num_waiting_for_streaming_input  # for their clients, not for us
        waiting = self._scheduler.waiting
        oldest = 0.0
        if len(waiting):
            head = waiting.peek_request()
            # A preempted request is put back at the head with the arrival time it always had; what it
            # waits for began when it was preempted.
            now = time.monotonic()
            oldest = now - self._last_preemption_s if head.num_preemptions else self._age_s(head, now)
        return EngineView(num_waiting, num_running, oldest)

    def on_arrival(self, request: Request) -> None:
        """Note a request that entered the waiting queue."""
        now = time.monotonic()
        self._note_arrival(request, now)
        self._monitor.on_arrival(now, self._waiting(request))

    def on_scheduled(self, new: Sequence[Any], resumed: Iterable[str]) -> None:
        """Note requests scheduled for the first time (`NewRequestData`), or again after a preemption (ids).

        vLLM's second model runner, which forgets what is preempted, is sent the latter as the former.
        """
        if not new and not resumed:
            return
        now = time.monotonic()
        again = set(resumed)
        for request_id in chain((data.req_id for data in new), again):
            if (request := self._scheduler.requests.get(request_id)) is None:
                self._monitor.on_resumed(request_id)
            elif request_id in again or request.num_output_tokens or request_id in self._awaiting_first_token:
                self._monitor.on_resumed(request_id, limits_of(request).tpot_s)
            else:
                age_s = self._age_s(request, now)
                self._monitor.on_scheduled(now, age_s, request_id, limits_of(request).tpot_s)
                self._awaiting_first_token[request_id] = (request, now - age_s)

    def on_sent(
        self, output: SchedulerOutput, level: int, settled: bool, used_blocks: int, ahead: Collection[StepInFlight]
    ) -> StepInFlight:
        """Return a step that is sent now.

        Steps of pipeline stages have no request in common: one waits for its own requests' last step, and a part of
        the stages is busy with the others meanwhile. Under async scheduling each waits for the one before.

        Args:
            output: vLLM's SchedulerOutput of the step.
            level: effective level.
            settled: no transition is under way.
            used_blocks: that live requests hold.
            ahead: sent before and not read yet, a few at most.
        """
        since_s, last_s = None, self._monitor.last_end_s
        if not isinstance(self._scheduler, AsyncScheduler):
            since_s = -inf if last_s is None else last_s
            settled = settled and all(step.num_tokens <= step.num_seqs for step in ahead)
        num_tokens, num_seqs = output.total_num_scheduled_tokens, len(output.num_scheduled_tokens)
        return StepInFlight(level, settled, used_blocks, num_tokens, num_seqs, since_s)

    def on_step(self, num_tokens: int, step: StepInFlight, ahead: Collection[StepInFlight]) -> None:
        """Note that requests have got the tokens of a step, so many of them.

        Args:
            num_tokens: sampled.
            step: that has been read.
            ahead: others that were sent and not read yet.
        """
        if not step.num_tokens:
            if not any(other.num_tokens for other in ahead):
                # vLLM makes such a step after the last request has ended; the next one may be long in coming.
                self._monitor.on_idle()
            return
        block_size, num_seqs = self._scheduler.block_size, step.num_seqs
        context = max(step.used_blocks * block_size - num_seqs * block_size // 2, 0)  # half of last blocks is empty
        self._monitor.on_step(
            time.monotonic(), num_tokens, num_seqs, step.num_tokens - num_seqs, context,
            step.level if step.settled else None, step.since_s,
        )  # fmt: skip
        if not self._awaiting_first_token:
            return
        now = time.monotonic()
        still: dict[str, tuple[Any, float]] = {}
        for request_id, (request, arrived_s) in self._awaiting_first_token.items():
            if request.num_output_tokens > 0:
                age_s = now - arrived_s
                self._monitor.on_first_token(age_s)
                if not request.is_finished():
                    self.late.on_first_token(request, request.arrival_time + age_s)
            elif not request.is_finished():
                still[request_id] = (request, arrived_s)
        self._awaiting_first_token = still

    def on_preemption(self, request: Request, forced: bool = False) -> None:
        """Note that a running request lost its blocks: `forced` by a restore, or for want of memory."""
        self._last_preemption_s = now = time.monotonic()
        self._monitor.on_preemption(now, self._waiting(request), forced)

    def on_floor(self, level: int, number: int) -> None:
        """Note requests that must not be served below a level; `number` below 0: that they have ended."""
        self._monitor.on_floor(level, number)

    def on_held(self, request: Request, has_arrived: bool) -> None:
        """Note that a request, told of or not, waits for another level: nothing that a deeper one could help."""
        self._monitor.on_held(request.request_id, has_arrived)

    def on_let_in(self, request: Request) -> None:
        """Note that a request waits in vLLM's queue that waited for another level."""
        now = time.monotonic()
        if request.num_preemptions:
            self._last_preemption_s = now
        else:
            self._note_arrival(request, now)
        self._monitor.on_let_in(now, self._waiting(request))

    def on_finish(self, request: Request) -> None:
        """Note a request that ends; its blocks are still its own."""
        num_blocks = sum(map(len, self._scheduler.kv_cache_manager.get_block_ids(request.request_id)))
        now = time.monotonic()
        self._monitor.on_finish(num_blocks, now, request.request_id, request.num_output_tokens)
        if not request.num_output_tokens:  # an idle engine makes no step that would look at it once more
            self._awaiting_first_token.pop(request.request_id, None)
        self.late.on_finish(request, request.arrival_time + self._age_s(request, now))
        self._arrived_s.pop(request.request_id, None)

    def on_turn_end(self, request: Request) -> None:
        """Note that a session's turn has stopped, which is the end of a request with these tokens and these limits."""
        if self._awaiting_first_token.pop(request.request_id, None) is not None and request.num_output_tokens:
            self._monitor.on_first_token(self._age_s(request, time.monotonic()))
        self.on_finish(request)

    def _note_arrival(self, request: Request, now_s: float) -> None:
        self._arrived_s.setdefault(request.request_id, now_s - max(0.0, time.time() - request.arrival_time))

    def _age_s(self, request: Request, now_s: float) -> float:
        """Return how long ago it arrived; one that was never told of, 0."""
        return now_s - self._arrived_s.get(request.request_id, now_s)

    def _waiting(self, request: Request) -> WaitingRequest:
        """Return a request as the queue sees it: what is to compute, by priority where the scheduler goes by that."""
        priority = int(request.priority) if self._scheduler.policy == SchedulingPolicy.PRIORITY else 0
        has_token = request.num_output_tokens > 0
        num_tokens = request.num_tokens - request.num_computed_tokens  # a session keeps what it has
        return WaitingRequest(request.request_id, num_tokens, limits_of(request), priority, has_token)
