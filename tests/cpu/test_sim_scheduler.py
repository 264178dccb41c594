"""The scheduler's model: its rules one by one, and against the plain version for any traffic."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cpu.sim_reference import ReferenceScheduler, Request
from hypothesis import given
from hypothesis import strategies as st

from morphserve.simulation.pool import SimPool
from morphserve.simulation.request import SimRequest
from morphserve.simulation.scheduler import Batch, SimScheduler
from morphserve.simulation.server import SimServer


@dataclass(frozen=True)
class Traffic:
    """Requests as (step before which it arrives, prompt, output), and the server."""

    requests: tuple[tuple[int, int, int], ...]
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_tokens: int
    depth: int = 1  # 2 = a step is planned before the one before is known

    @property
    def server(self) -> SimServer:
        sizes = (self.num_blocks, self.block_size, 10_000, self.max_num_seqs, self.max_tokens)
        return SimServer(*sizes, async_scheduling=self.depth > 1)


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
    pool = SimPool(traffic.num_blocks)
    scheduler = SimScheduler(traffic.server, pool)
    arrivals = deque(
        (at, SimRequest(i, str(i), prompt, output, 0.0)) for i, (at, prompt, output) in enumerate(traffic.requests)
    )
    story: list[Told] = []
    under_way: deque[tuple[Batch, Told]] = deque()

    def plan() -> bool:
        batch = scheduler.schedule()
        told = Told(
            [r.index for r in batch.admitted], [r.index for r in batch.preempted], batch.num_seqs,
            batch.num_seqs + batch.prefill_tokens, batch.context_tokens, batch.num_tokens, pool.used,
        )  # fmt: skip
        assert pool.used <= pool.capacity
        if batch.num_seqs:
            story.append(told)
            under_way.append((batch, told))
        return batch.num_seqs > 0

    def end() -> None:
        batch, told = under_way.popleft()
        scheduler.complete(batch)
        told.ended = [r.index for r in batch.ends]

    _drive(traffic, arrivals, scheduler.add, plan, end, under_way, lambda: bool(scheduler.running or scheduler.waiting))
    return story


def run_reference(traffic: Traffic) -> list[Told]:
    scheduler = ReferenceScheduler(
        traffic.num_blocks, traffic.block_size, traffic.max_num_seqs, traffic.max_tokens, traffic.depth > 1
    )
    arrivals = deque((at, Request(i, prompt, output)) for i, (at, prompt, output) in enumerate(traffic.requests))
    story: list[Told] = []
    under_way: deque = deque()

    def plan() -> bool:
        step = scheduler.schedule()
        told = Told(
            [r.index for r in step.admitted], [r.index for r in step.preempted], len(step.scheduled),
            sum(step.scheduled.values()), step.context, len(step.makes), scheduler.capacity - scheduler.free,
        )  # fmt: skip
        if step.scheduled:
            story.append(told)
            under_way.append((step, told))
        return bool(step.scheduled)

    def end() -> None:
        step, told = under_way.popleft()
        told.ended = [r.index for r in scheduler.update(step)]

    _drive(
        traffic, arrivals, scheduler.waiting.append, plan, end, under_way,
        lambda: bool(scheduler.running or scheduler.waiting),
    )  # fmt: skip
    return story


def _drive(traffic, arrivals, add, plan, end, under_way, busy) -> None:  # type: ignore[no-untyped-def]
    """As vLLM's engine core does: `step`, or with depth 2 `step_with_batch_queue`."""
    planned = 0
    for _ in range(20_000):
        while arrivals and (arrivals[0][0] <= planned or not busy() and not under_way):
            add(arrivals.popleft()[1])
        if not busy() and not under_way:
            return
        computes = busy() and plan()
        planned += computes
        if len(under_way) < traffic.depth and computes:
            continue
        if under_way:
            end()
    raise AssertionError("it never ends")


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    block_size = draw(st.sampled_from([1, 2, 4, 7]))
    max_num_seqs = draw(st.integers(1, 8))
    lengths = st.tuples(st.integers(0, 12), st.integers(1, 40), st.integers(1, 30))
    requests = draw(st.lists(lengths, min_size=1, max_size=14))
    requests.sort(key=lambda r: r[0])
    longest = max(prompt + output for _, prompt, output in requests)
    floor = -(-longest // block_size) + 1
    return Traffic(
        tuple(requests),
        num_blocks=floor + draw(st.integers(0, 12)),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_tokens=max_num_seqs + draw(st.integers(0, 40)),
        depth=draw(st.sampled_from([1, 1, 2])),
    )


@given(traffics())
def test_same_steps_as_the_plain_version(traffic: Traffic) -> None:
    """Guards: a shortcut of the model (buckets, step numbers, running sums) changes who runs when."""
    assert run_model(traffic) == run_reference(traffic)
