"""The same traffic through the model, the plain version and, in tests/seams, vLLM's own scheduler."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cpu.sim_reference import ReferenceScheduler, Request
from hypothesis import strategies as st

from morphserve.tools.sim.pool import SimPool
from morphserve.tools.sim.prefix import CachingScheduler, PromptContents
from morphserve.tools.sim.request import SimRequest
from morphserve.tools.sim.scheduler import SimScheduler
from morphserve.tools.sim.server import SimServer
from morphserve.tools.workload.formats import TraceRequest
from morphserve.tools.workload.workload import Workload

BLOCK_TOKENS = 8  # of a hash id


@dataclass(frozen=True)
class Traffic:
    """Requests as (step before which it arrives, prompt, output), and the server."""

    requests: tuple[tuple[int, int, int], ...]
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_tokens: int
    depth: int = 1  # 2 = a step is planned before the one before is known
    hash_ids: tuple[tuple[int, ...], ...] | None = None  # by request; None = no prefix cache

    @property
    def server(self) -> SimServer:
        sizes = (self.num_blocks, self.block_size, 10_000, self.max_num_seqs, self.max_tokens)
        return SimServer(*sizes, async_scheduling=self.depth > 1)

    def make_scheduler(self, pool: SimPool) -> SimScheduler:
        if self.hash_ids is None:
            return SimScheduler(self.server, pool)
        requests = [
            TraceRequest(0.0, prompt, output, ids)
            for (_, prompt, output), ids in zip(self.requests, self.hash_ids, strict=True)
        ]
        contents = PromptContents.of(Workload("", tuple(requests), BLOCK_TOKENS), self.block_size)
        return CachingScheduler(self.server, pool, contents)


@dataclass
class Told:
    """What happened in one step, in numbers only."""

    admitted: list[int]
    preempted: list[int]
    num_seqs: int
    num_scheduled: int
    context: int
    num_tokens: int
    used: int  # blocks, after planning
    ended: list[int] = field(default_factory=list)


def run_model(traffic: Traffic) -> list[Told]:
    """The story of the fast one."""
    pool = SimPool(traffic.num_blocks)
    scheduler = traffic.make_scheduler(pool)

    def plan() -> tuple[Any, Told]:
        batch = scheduler.schedule()
        assert pool.used <= pool.capacity
        return batch, Told(
            [r.index for r in batch.admitted], [r.index for r in batch.preempted], batch.num_seqs,
            batch.num_seqs + batch.prefill_tokens, batch.context_tokens, batch.num_tokens, pool.used,
        )  # fmt: skip

    def end(batch: Any) -> list[int]:
        scheduler.complete(batch)
        return [r.index for r in batch.ends]

    requests = [SimRequest(i, str(i), prompt, output, 0.0) for i, (_, prompt, output) in enumerate(traffic.requests)]
    story = drive(traffic, requests, scheduler.add, plan, end, lambda: bool(scheduler.running or scheduler.waiting))
    assert pool.used == 0, "blocks were lost"
    return story


def run_reference(traffic: Traffic) -> list[Told]:
    """The story of the plain one."""
    scheduler = ReferenceScheduler(
        traffic.num_blocks, traffic.block_size, traffic.max_num_seqs, traffic.max_tokens, traffic.depth > 1
    )

    def plan() -> tuple[Any, Told]:
        step = scheduler.schedule()
        return step, Told(
            [r.index for r in step.admitted], [r.index for r in step.preempted], len(step.scheduled),
            sum(step.scheduled.values()), step.context, len(step.makes), scheduler.capacity - scheduler.free,
        )  # fmt: skip

    requests = [Request(i, prompt, output) for i, (_, prompt, output) in enumerate(traffic.requests)]
    return drive(
        traffic, requests, scheduler.waiting.append, plan, lambda step: [r.index for r in scheduler.update(step)],
        lambda: bool(scheduler.running or scheduler.waiting),
    )  # fmt: skip


def drive(
    traffic: Traffic,
    requests: list[Any],
    add: Callable[[Any], Any],
    plan: Callable[[], tuple[Any, Told]],
    end: Callable[[Any], list[int]],
    busy: Callable[[], bool],
) -> list[Told]:
    """As vLLM's engine core does: `step`, or with depth 2 `step_with_batch_queue`."""
    arrivals = deque((at, request) for (at, _, _), request in zip(traffic.requests, requests, strict=True))
    story: list[Told] = []
    under_way: deque[tuple[Any, Told]] = deque()
    for _ in range(20_000):
        while arrivals and (arrivals[0][0] <= len(story) or not busy() and not under_way):
            add(arrivals.popleft()[1])
        if not busy() and not under_way:
            return story
        computes = False
        if busy():
            step, told = plan()
            computes = told.num_seqs > 0
            if computes:
                story.append(told)
                under_way.append((step, told))
        if under_way and not (computes and len(under_way) < traffic.depth):
            step, told = under_way.popleft()
            told.ended = end(step)
    raise AssertionError("it never ends")


@st.composite
def traffics(draw: st.DrawFn, block_sizes: tuple[int, ...] = (1, 2, 4, 7), caching: bool = False) -> Traffic:
    """Few blocks, so that requests are preempted."""
    block_size = draw(st.sampled_from(block_sizes))
    max_num_seqs = draw(st.integers(1, 8))
    lengths = st.tuples(st.integers(0, 12), st.integers(1, 40), st.integers(1, 6) | st.integers(1, 30))
    requests = sorted(draw(st.lists(lengths, min_size=1, max_size=14)), key=lambda r: r[0])
    longest = max(prompt + output for _, prompt, output in requests)
    ids = st.lists(st.integers(0, 2), max_size=5).map(tuple)
    return Traffic(
        tuple(requests),
        num_blocks=-(-longest // block_size) + 1 + draw(st.integers(0, 12)),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_tokens=max_num_seqs + draw(st.integers(0, 40)),
        depth=1 if caching else draw(st.sampled_from([1, 1, 2])),
        hash_ids=tuple(draw(ids) for _ in requests) if caching else None,
    )
