"""vLLM's V1 scheduler as a model: the same requests run, wait and are preempted in the same steps.

A step that only decodes costs the same however many requests run: each advances by one token a step, so what happens to
it next (a block more, its last token) is known by step number when it begins to decode.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from morphserve.tools.sim.pool import SimPool
from morphserve.tools.sim.request import Batch, SimRequest, State
from morphserve.tools.sim.server import SimServer


class SimScheduler:
    """A scheduler of chunked prefill, first come first served, recompute preemption; without a prefix cache.

    1. Running requests come first, in the order of their admission; each gets a block when it needs one.
    2. Who gets none preempts the request admitted last, itself perhaps: its blocks are free, it keeps its tokens, and
       waits at the head of the queue.
    3. Only when nobody was preempted in the step the head of the queue is admitted, if all its tokens fit into free
       blocks (`scheduler_reserve_full_isl`). What is left of `max_num_batched_tokens` limits its first chunk, which is
       all that it is given blocks for.
    """

    def __init__(self, server: SimServer, pool: SimPool) -> None:
        self.pool = pool
        self.step = 0  # number of the next one
        self.waiting: deque[SimRequest] = deque()
        self.running: dict[SimRequest, None] = {}  # in order of admission
        self.num_preempted = 0
        self.level = 0  # that the next step runs at
        self._in_flight = 0  # steps planned whose tokens are not known yet
        self._block_size = server.block_size
        self._max_num_seqs = server.max_num_seqs
        self._max_tokens = server.max_num_batched_tokens
        self._partial: SimRequest | None = None  # the one in State.PREFILL
        self._num_decoding = 0
        self._sum_base = 0  # of `base` over those that decode
        # By `base % block_size`: at step s those at -s % block_size have filled their blocks.
        self._phases: list[dict[SimRequest, None]] = [{} for _ in range(server.block_size)]
        self._ending: dict[int, list[SimRequest]] = {}  # by last_step
        pool.preempt = self.preempt_cheapest
        self.on_forced_preemption: Callable[[SimRequest], None] = lambda _: None

    # ---- from outside

    def add(self, request: SimRequest) -> None:
        """Queue a request that arrives."""
        self.waiting.append(request)

    def schedule(self) -> Batch:
        """Plan the next step. Follow with `complete` when it has ended."""
        preempted: list[SimRequest] = []
        admitted: list[SimRequest] = []
        if growing := self._phases[-self.step % self._block_size]:
            self._grow(growing, preempted)
        decoding = self._num_decoding
        batch = Batch(
            self.step, decoding, 0, self._sum_base + (self.step + 1) * decoding, decoding, [], [], admitted, preempted
        )
        if self._partial is not None or self.waiting:
            self._prefill(batch)
        elif not decoding:
            return batch
        if ends := self._ending.pop(self.step, None):
            for request in ends:
                self._stop_decoding(request)
                request.state = State.ENDING
            batch.ends = ends + batch.ends  # in the order in which they run
        if batch.num_seqs:
            self.step += 1
            self._in_flight += 1
        return batch

    def complete(self, batch: Batch) -> None:
        """Count the tokens of a step, known only now; those that made their last one leave, and give their blocks back.

        `batch.ends` keeps those for which that is so.
        """
        self._in_flight -= 1
        if not batch.ends:
            return
        ends, batch.ends = batch.ends, []
        for request in ends:
            if request.state is State.ENDING:
                self._leave(request)
                del self.running[request]
            elif request.state is State.WAITING and request.generated == request.output_tokens:
                self.waiting.remove(request)  # preempted while its last token was under way
            else:
                continue  # that token was dropped, or the client has gone
            request.state = State.DONE
            batch.ends.append(request)

    def abort(self, request: SimRequest, is_held: bool = False) -> int:
        """Drop a request whose client has gone; return how many blocks it held. `is_held`: outside of the queue."""
        num_blocks = 0
        if request.state is State.WAITING:
            if not is_held:
                self.waiting.remove(request)
        else:
            num_blocks = self._blocks_of(request)
            self._leave(request)
            del self.running[request]
        request.state = State.DONE
        return num_blocks

    def preempt_cheapest(self) -> bool:
        """Preempt, between two steps, the running request that costs least to compute again; of several the newest.

        Never the only one. A token of it that is under way is dropped.
        """
        if len(self.running) < 2:
            return False
        victim = min(reversed(self.running), key=self._computed)
        del self.running[victim]
        self._preempt(victim, num_dropped=self._in_flight)
        self.on_forced_preemption(victim)
        return True

    def send_back(self, request: SimRequest) -> None:
        """Preempt a request, if it runs, between two steps; it waits at the head of the queue."""
        if request.state is not State.WAITING:
            del self.running[request]
            self._preempt(request, num_dropped=self._in_flight)

    # ---- blocks; a scheduler with a prefix cache knows which ones

    def _blocks_of(self, request: SimRequest) -> int:
        return -(-self._computed(request) // self._block_size)

    def _release(self, request: SimRequest) -> None:
        """Free all its blocks."""
        self.pool.release(self._blocks_of(request))

    def _take_one(self, request: SimRequest) -> None:
        """Take the next block of a request that decodes."""
        self.pool.used += 1

    def _extend(self, request: SimRequest, num_tokens: int) -> bool:
        """Take blocks for its next `num_tokens`; False = there are not enough."""
        size = self._block_size
        need = -(-(request.computed + num_tokens) // size) - -(-request.computed // size)
        if need > self.pool.capacity - self.pool.used and need:
            return False
        self.pool.used += need
        return True

    def _begin(self, request: SimRequest, budget: int) -> int:
        """Take blocks for a waiting request's first chunk, if all its tokens would fit; return the chunk's tokens."""
        total = request.prompt_tokens + request.generated
        if -(-total // self._block_size) > self.pool.capacity - self.pool.used:
            return 0
        count = min(total, budget)
        self.pool.used += -(-count // self._block_size)
        return count

    # ---- parts of a step

    def _grow(self, growing: dict[SimRequest, None], preempted: list[SimRequest]) -> None:
        """Take a block for each of those whose blocks are full."""
        pool = self.pool
        if len(growing) <= pool.capacity - pool.used:
            for request in growing:
                self._take_one(request)
            return
        for request in list(growing):  # in the order in which they run
            if request.state is not State.DECODE:
                continue
            while pool.capacity <= pool.used:
                victim, _ = self.running.popitem()
                self._preempt(victim)
                preempted.append(victim)
                if victim is request:
                    return  # it was the last
            self._take_one(request)

    def _prefill(self, batch: Batch) -> None:
        """Continue the prompt that was begun, then admit."""
        budget = self._max_tokens - self._num_decoding
        if (request := self._partial) is not None:
            count = min(request.num_tokens - request.computed, budget)
            if not self._extend(request, count):
                self.running.popitem()
                self._preempt(request)
                batch.preempted.append(request)
                return
            budget -= count
            self._compute(request, count, batch)
        if batch.preempted:
            return
        while budget > 0 and self.waiting and len(self.running) < self._max_num_seqs:
            request = self.waiting[0]
            count = self._begin(request, budget)
            if not count:
                return
            self.waiting.popleft()
            self.running[request] = None
            batch.admitted.append(request)
            budget -= count
            self._compute(request, count, batch)

    def _compute(self, request: SimRequest, count: int, batch: Batch) -> None:
        """Put a chunk of prompt into the step; where it is the last, the request decodes from the next step on."""
        request.computed += count
        batch.num_seqs += 1
        batch.prefill_tokens += count - 1
        batch.context_tokens += request.computed
        if request.computed < request.num_tokens:
            request.state, self._partial = State.PREFILL, request
            return
        if request is self._partial:
            self._partial = None
        batch.num_tokens += 1
        request.joined = self.step
        if request.first_step < 0:
            request.first_step = self.step
            batch.firsts.append(request)
        request.last_step = self.step + request.output_tokens - request.generated - 1
        if request.last_step == self.step:
            request.state = State.ENDING
            batch.ends.append(request)
        else:
            self._start_decoding(request)

    def _start_decoding(self, request: SimRequest) -> None:
        request.state = State.DECODE
        request.base = request.computed - self.step - 1
        self._num_decoding += 1
        self._sum_base += request.base
        self._phases[request.base % self._block_size][request] = None
        self._ending.setdefault(request.last_step, []).append(request)

    def _stop_decoding(self, request: SimRequest) -> None:
        self._num_decoding -= 1
        self._sum_base -= request.base
        del self._phases[request.base % self._block_size][request]

    def _preempt(self, victim: SimRequest, num_dropped: int = 0) -> None:
        """Put a request that left `running` at the head of the queue, with what it has generated."""
        self._leave(victim, num_dropped)
        victim.computed = 0
        victim.state = State.WAITING
        victim.preemptions += 1
        self.num_preempted += 1
        self.waiting.appendleft(victim)

    def _leave(self, request: SimRequest, num_dropped: int = 0) -> None:
        """Free its blocks and count its tokens; the newest `num_dropped` steps are as if they had not been."""
        self._release(request)
        if request.state is State.PREFILL:
            self._partial = None
            return
        if request.state is State.DECODE:
            self._stop_decoding(request)
            self._ending[request.last_step].remove(request)
        made = min(self.step, request.last_step + 1) - request.joined
        made -= min(num_dropped, made)
        request.generated += made
        if made:
            request.runs.append((request.joined, made))
        if not request.generated:
            request.first_step = -1

    def _computed(self, request: SimRequest) -> int:
        """Return its tokens in the KV cache before the next step, those under way included."""
        if request.state is State.DECODE:
            return request.base + self.step
        if request.state is State.ENDING:
            return request.prompt_tokens + request.output_tokens - 1
        return request.computed
