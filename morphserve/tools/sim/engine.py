"""The virtual engine: a clock, arrivals, the scheduler's model, and the controller before every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import inf

from morphserve.tools.sim.morphing import Morphing
from morphserve.tools.sim.pace import Pace
from morphserve.tools.sim.recorder import Recorder
from morphserve.tools.sim.request import Batch, SimRequest, State
from morphserve.tools.sim.scheduler import SimScheduler
from morphserve.tools.sim.server import SimServer

BatchInFlight = tuple[Batch, float, int, int | None]  # batch, its end, the level of its tokens, the level of all layers


class SimEngine:
    """A model of vLLM's engine core: the same in the same order, on a clock of its own.

    Attributes:
        requests: all of the workload, in the order of their arrival.
        now_s: since the start of the workload; below 0 while the controller settles before it.
        ends: when each step ended, by its number.
        levels: that each step's tokens count for.
        refused: at the door.
        timed_out: the client gave up on them.
    """

    def __init__(self, server: SimServer, requests: Sequence[SimRequest], pace: Pace, scheduler: SimScheduler) -> None:
        """Take `requests` in the order of their arrival."""
        self.now_s = 0.0
        self.ends: list[float] = []
        self.levels: list[int] = []
        self.refused: list[SimRequest] = []
        self.timed_out: list[SimRequest] = []
        self.tokens_by_level = [0]
        self._server = server
        self.requests = requests
        self._pace = pace
        self._scheduler = scheduler
        self._morphing: Morphing | None = None
        self._recorder: Recorder | None = None
        self._depth = 2 if server.async_scheduling else 1  # steps under way, as vLLM's batch queue has it
        self._in_flight: deque[BatchInFlight] = deque()
        self._busy_until_s = 0.0  # end of the newest step
        self._pause_s = 0.0  # before the next step
        self._next = 0  # request that has not come yet
        self._admitted: deque[SimRequest] = deque()  # has come, between two steps
        self._queued_tokens = 0  # prompts of accepted requests without a first token
        self._oldest = 0  # request whose time-out comes next
        self._due_s = 0.0  # of the next thing that is no step
        self._cutoff_s = requests[-1].arrival_s + server.cutoff_s

    def run(
        self, recorder: Recorder, morphing: Morphing | None, give_up: Callable[[SimEngine], bool] | None = None
    ) -> None:
        """Run the whole workload, and until level 0 after it; `give_up`: see `simulate`."""
        self._recorder, self._morphing = recorder, morphing
        if morphing is not None:
            self.tokens_by_level.extend([0] * (len(morphing.ladder) - 1))
            self.now_s = -3600.0
            morphing.settle(self._scheduler, self._advance, self._server.idle_step_s)
            self.now_s = 0.0
        scheduler, in_flight = self._scheduler, self._in_flight
        while True:
            if self._due_s <= self.now_s:
                self._happen()
                if give_up is not None and give_up(self):
                    break
            if not scheduler.running and not scheduler.waiting and not in_flight:
                if not self._idle():
                    break
                continue
            self._step()
        recorder.finish(self.now_s)

    # ---- steps

    def _step(self) -> None:
        """Do one turn of the engine core's loop."""
        scheduler, morphing, in_flight = self._scheduler, self._morphing, self._in_flight
        level, settled_level = 0, None
        if morphing is not None:
            pause_s = morphing.tick(scheduler)
            level = morphing.controller.effective_level
            settled_level = None if pause_s or morphing.controller.in_transition else morphing.settled_level
            scheduler.level = level
            self._pause_s += pause_s
            if self._depth == 1:
                self.now_s += pause_s
        batch = scheduler.schedule()
        if morphing is not None and (batch.preempted or batch.admitted):
            morphing.on_scheduled(self.now_s, batch)
        if batch.num_seqs:
            start_s = self.now_s if self._depth == 1 else max(self.now_s, self._busy_until_s) + self._pause_s
            self._pause_s = 0.0
            seconds = self._pace.seconds(batch.num_seqs, batch.prefill_tokens, batch.context_tokens)
            self._busy_until_s = start_s + seconds
            in_flight.append((batch, self._busy_until_s, level, settled_level))
            if len(in_flight) < self._depth:
                return
        if not (in_flight or scheduler.running or scheduler.waiting):
            return  # all that ran wait for another level
        assert in_flight or batch.preempted, "requests wait, nothing runs, and none of them fits"
        if in_flight:
            self._complete(*in_flight.popleft())

    def _complete(self, batch: Batch, end_s: float, level: int, settled_level: int | None) -> None:
        limited = self._counts_queue
        if limited:
            self._admit(end_s)  # they came before the tokens of this step were known
        self.now_s = end_s
        self.ends.append(end_s)
        self.levels.append(level)
        self._scheduler.complete(batch)
        self.tokens_by_level[level] += batch.num_tokens
        if limited:
            self._queued_tokens -= sum(request.prompt_tokens for request in batch.firsts)
        if self._morphing is not None:
            self._morphing.on_completed(end_s, batch, settled_level)

    # ---- what is no step

    def _happen(self) -> None:
        """Process all that is due."""
        now_s = self.now_s
        assert self._recorder is not None
        self._recorder.catch_up(now_s)
        self._admit(now_s)
        while self._admitted:
            request = self._admitted.popleft()
            self._scheduler.add(request)
            if self._morphing is not None:
                self._morphing.on_arrival(now_s, request, self._scheduler)
        self._time_out(now_s)
        if now_s >= self._cutoff_s:
            for request in self.requests:
                self._abort(request)
        self._due_s = min(self._recorder.due_s, self._next_arrival_s(), self._next_timeout_s(), self._next_cutoff_s())

    def _admit(self, until_s: float) -> None:
        """Bring requests to the server's door, where some are refused: beyond a queue limit, or a level's."""
        while self._next_arrival_s() <= until_s:
            request = self.requests[self._next]
            self._next += 1
            if self._is_queue_full() or self._asks_too_much(request):
                request.state = State.DONE
                self.refused.append(request)
                continue
            self._queued_tokens += request.prompt_tokens
            self._admitted.append(request)

    @property
    def _counts_queue(self) -> bool:
        return self._server.max_num_queued_tokens is not None or self._morphing is not None

    def _is_queue_full(self) -> bool:
        """Return whether the prompts of those who wait have reached the server's own limit, or the policy's."""
        own = self._server.max_num_queued_tokens
        policys = None if self._morphing is None else self._morphing.controller.max_queued_tokens
        return any(limit is not None and self._queued_tokens >= limit for limit in (own, policys))

    def _asks_too_much(self, request: SimRequest) -> bool:
        """Return whether a request asks for a level that the policy holds up for nobody new."""
        own = request.max_level
        return own is not None and self._morphing is not None and own < self._morphing.controller.min_floor

    def _time_out(self, now_s: float) -> None:
        while self._next_timeout_s() <= now_s:
            request = self.requests[self._oldest]
            if self._abort(request):
                self.timed_out.append(request)
            self._oldest += 1

    def _abort(self, request: SimRequest) -> bool:
        """End a request whose client goes; False = it had its answer."""
        if request.state is State.DONE:
            return False
        if request.first_step < 0:
            self._queued_tokens -= request.prompt_tokens
        is_held = self._morphing is not None and self._morphing.gate.is_held(request)
        num_blocks = self._scheduler.abort(request, is_held)
        if self._morphing is not None:
            self._morphing.on_finish(self.now_s, request, num_blocks)
        return True

    def _next_arrival_s(self) -> float:
        return self.requests[self._next].arrival_s if self._next < len(self.requests) else inf

    def _next_timeout_s(self) -> float:
        """Return the next time-out of those that have come: they come in order, so they time out in order."""
        while self._oldest < self._next and self.requests[self._oldest].state is State.DONE:
            self._oldest += 1
        if self._oldest == self._next:
            return inf
        return self.requests[self._oldest].arrival_s + self._server.request_timeout_s

    def _next_cutoff_s(self) -> float:
        return self._cutoff_s if self.now_s < self._cutoff_s else inf

    # ---- without work

    def _idle(self) -> bool:
        """Go to the next request; False = none comes, and level 0 is reached or was waited for long enough."""
        morphing, server = self._morphing, self._server
        last = self._next == len(self.requests)
        give_up_s = self.now_s + server.restore_wait_s if last else inf
        while self._next_arrival_s() > self.now_s:
            until_s = self._next_arrival_s()
            if morphing is not None:
                self._advance(morphing.tick(self._scheduler))
                if self._scheduler.waiting:  # they waited for this level
                    return True
                if last and (self.now_s >= give_up_s or not morphing.controller.effective_level):
                    return False
                if morphing.controller.in_transition:
                    until_s = min(until_s, self.now_s + server.idle_step_s)
                elif morphing.controller.wants_wakeup:
                    until_s = min(until_s, self.now_s + server.wake_interval_s)
            if until_s == inf:
                return False
            self._advance(max(until_s - self.now_s, 0.0))
            if self._due_s <= self.now_s:
                self._happen()
                if self._scheduler.waiting:
                    return True
        return True

    def _advance(self, seconds: float) -> None:
        self.now_s += seconds
