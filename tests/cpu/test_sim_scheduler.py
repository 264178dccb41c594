"""The scheduler's model: its rules one by one, and against the plain version for any traffic."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cpu.sim_traffic import Traffic, run_model, run_reference, traffics
from hypothesis import given

from morphserve.errors import ConfigError
from morphserve.tools.sim.pool import SimPool
from morphserve.tools.sim.prefix import CachingScheduler, PromptContents
from morphserve.tools.sim.request import Batch, SimRequest, State
from morphserve.tools.sim.scheduler import SimScheduler
from morphserve.tools.sim.server import SimServer

# Six blocks of four tokens for two requests that end with four blocks each.
TIGHT = Traffic(((0, 6, 10), (0, 6, 10)), num_blocks=7, block_size=4, max_num_seqs=4, max_tokens=16)


@given(traffics())
def test_same_steps_as_the_plain_version(traffic: Traffic) -> None:
    """Guards: a shortcut of the model (buckets, step numbers, running sums) changes who runs when."""
    assert run_model(traffic) == run_reference(traffic)


def test_the_plain_version_meets_what_is_rare() -> None:
    """Guards the test above: traffic so light that nothing is preempted, chunked or cut off by the limits."""
    counts = {"preempted": 0, "chunked": 0, "stale": 0}

    @given(traffics())
    def look(traffic: Traffic) -> None:
        story = run_reference(traffic)
        counts["preempted"] += sum(len(told.preempted) for told in story)
        counts["chunked"] += sum(told.num_tokens < told.num_seqs for told in story)
        if traffic.depth == 2:
            lost = {index for told in story for index in told.preempted}
            counts["stale"] += len(lost)

    look()
    assert min(counts.values()) > 20, counts


def test_the_last_admitted_is_preempted_and_comes_back_first() -> None:
    """Guards: another victim than vLLM's, or one that loses its tokens or its place."""
    story = run_model(replace(TIGHT, requests=(*TIGHT.requests, (1, 3, 2)), max_num_seqs=2))
    (step,) = [i for i, told in enumerate(story) if told.preempted]
    assert story[step].preempted == [1]
    assert story[step].admitted == [], "nobody is admitted in a step in which somebody was preempted"
    back = next(told for told in story[step:] if told.admitted)
    assert back.admitted == [1, 2], "the newcomer waits behind"
    # All it has is computed again: 6 tokens of prompt and those it had generated when it lost its blocks.
    assert back.num_scheduled == (6 + step) + 3


def test_admission_reserves_all_tokens_but_gives_blocks_for_the_chunk() -> None:
    """Guards: admission by the first chunk alone (thrashing), or blocks that are held before they are needed."""
    long = Traffic(((0, 4, 20), (0, 16, 2)), num_blocks=8, block_size=4, max_num_seqs=4, max_tokens=8)
    first, second = run_model(long)[:2]
    assert first.admitted == [0, 1] and first.num_scheduled == 8 and first.used == 1 + 1
    assert (second.num_scheduled, second.used) == (1 + 7, 2 + 3)
    crowded = replace(long, num_blocks=7, requests=((0, 9, 12), (0, 16, 2)))
    assert run_model(crowded)[0].admitted == [0], "16 tokens need 4 blocks, 3 are free"


def test_the_budget_goes_to_running_requests_first() -> None:
    """Guards: a prompt that takes the tokens of those who decode."""
    story = run_model(Traffic(((0, 4, 30), (1, 40, 1)), 30, 4, max_num_seqs=2, max_tokens=10))
    assert [told.num_scheduled for told in story[:7]] == [4, 10, 10, 10, 10, 5, 1]


def test_async_scheduling_frees_a_step_later() -> None:
    """Guards: the place of a request is given away before its last token is known."""
    one_place = Traffic(((0, 4, 3), (0, 4, 3)), 20, 4, max_num_seqs=1, max_tokens=8)
    assert [told.admitted for told in run_model(one_place)] == [[0], [], [], [1], [], []]
    late = run_model(replace(one_place, depth=2, requests=((0, 4, 3), (0, 4, 1), (0, 4, 3)), max_num_seqs=2))
    # Request 1 makes its only token in step 0, which is known once step 1 has been planned.
    assert [told.admitted for told in late][:3] == [[0, 1], [], [2]]


def scheduled(scheduler: SimScheduler) -> Batch:
    batch = scheduler.schedule()
    scheduler.complete(batch)
    return batch


def make(num_blocks: int, *requests: tuple[int, int]) -> tuple[SimScheduler, list[SimRequest]]:
    scheduler = SimScheduler(SimServer(num_blocks, 4, 200, 8, 32), SimPool(num_blocks))
    made = [SimRequest(i, str(i), prompt, output, 0.0) for i, (prompt, output) in enumerate(requests)]
    for request in made:
        scheduler.add(request)
    return scheduler, made


def test_a_shrink_preempts_the_cheapest_and_never_the_last() -> None:
    """Guards: a shrink without room that throws away the most work, or stops the engine."""
    scheduler, (long, short, longer) = make(40, (12, 9), (3, 9), (13, 9))
    scheduled(scheduler)
    scheduled(scheduler)
    assert scheduler.preempt_cheapest()
    assert (short.state, short.generated, short.runs) == (State.WAITING, 2, [(0, 2)])
    assert list(scheduler.running) == [long, longer] and scheduler.pool.used == 4 + 4
    assert scheduler.preempt_cheapest() and not scheduler.preempt_cheapest()
    assert long.state is State.WAITING and list(scheduler.running) == [longer]


def test_a_shrink_drops_a_token_that_is_under_way() -> None:
    """Guards: with async scheduling a token that the engine drops is counted, and its request ends a token short."""
    scheduler, (a, b) = make(40, (4, 2), (8, 2))
    first = scheduler.schedule()
    assert scheduler.preempt_cheapest()
    scheduler.complete(first)
    assert (a.generated, a.first_step, a.runs, b.generated) == (0, -1, [], 0)
    for _ in range(4):
        scheduled(scheduler)
    assert a.state is State.DONE and (a.generated, a.runs) == (2, [(1, 2)])
    assert scheduler.pool.used == 0


def test_a_last_token_that_is_dropped_is_made_again() -> None:
    """Guards: a request that is taken for ended because its last token was under way when a shrink preempted it."""
    scheduler, (gone, _) = make(40, (4, 1), (8, 2))
    first = scheduler.schedule()
    assert scheduler.preempt_cheapest()
    scheduler.complete(first)
    assert gone.state is State.WAITING and first.ends == []
    while scheduler.running or scheduler.waiting:
        scheduled(scheduler)
    assert (gone.state, gone.runs) == (State.DONE, [(1, 1)])


def test_a_shrink_evicts_what_was_freed_first() -> None:
    """Guards: hits on cached blocks that the smaller pool has no room for."""
    pool = SimPool(21)
    contents = PromptContents(4, 512, [(1,), (2,), (1,)])
    scheduler = CachingScheduler(SimServer(21, 4, 80, 8, 64), pool, contents)
    for index in range(3):
        if index == 2:
            pool.begin_shrink(11)
        scheduler.add(SimRequest(index, str(index), 32, 1, 0.0))
        scheduled(scheduler)
    # Of 16 cached blocks 10 have room: the 8 of the newer prompt, and the first two of the older one.
    assert scheduler.hit_tokens == 2 * 4


@pytest.mark.parametrize(("steps", "blocks"), [(0, 0), (1, 8), (2, 13), (3, 13)])
def test_abort_gives_everything_back(steps: int, blocks: int) -> None:
    """Guards: blocks, places or sums of a request whose client has gone, in whatever state."""
    scheduler, (gone, stays) = make(40, (50, 3), (5, 5))
    for _ in range(steps):
        scheduled(scheduler)
    assert scheduler.abort(gone) == blocks
    while scheduler.running or scheduler.waiting:
        scheduled(scheduler)
    assert stays.generated == 5 and scheduler.pool.used == 0
    assert scheduler.schedule().num_seqs == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_num_batched_tokens": 8}, "max_num_batched_tokens 8 is below max_num_seqs 64"),
        ({"block_size": 0}, "block_size is 0"),
        ({"max_num_queued_tokens": -1}, "max_num_queued_tokens is -1"),
        ({"request_timeout_s": 0.0}, "request_timeout_s is 0.0"),
        ({"step_noise": float("nan")}, "step_noise is nan"),
    ],
)
def test_settings_that_make_no_server_are_refused(change: dict, message: str) -> None:
    """Guards: a simulation of a server that cannot be started, or that never ends."""
    with pytest.raises(ConfigError, match=message):
        replace(SimServer(49, 32, 512), **change)
