"""The pool in numbers: what it offers while it grows and shrinks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.errors import IllegalTransition
from morphserve.tools.sim.pool import SimPool

KINDS = ["take", "free", "grow", "begin", "advance", "end", "cancel"]
OPERATIONS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 99)))


@given(OPERATIONS)
def test_never_more_blocks_than_there_are(operations: list[tuple[str, int]]) -> None:
    """Guards: a simulation that hands out blocks beyond the published ones, or fences ones in use for good."""
    pool, fence = SimPool(20), None
    for name, number in operations:
        room = pool.capacity - pool.used
        if name == "take":
            pool.used += min(number % 9, max(room, 0))
        elif name == "free":
            pool.release(min(number % 9, pool.used))
        elif name == "grow" and fence is None:
            pool.grow(pool.num_kv_blocks + number % 30)
        elif name == "begin" and fence is None and pool.num_kv_blocks > 10:
            fence = 2 + number % (pool.num_kv_blocks - 2)
            pool.begin_shrink(fence)
        elif name == "advance" and fence is not None:
            progress = pool.advance_shrink(number % 6)
            sources, destinations = {s for s, _ in progress.copies}, {d for _, d in progress.copies}
            assert len(progress.copies) == len(sources) == len(destinations) <= number % 6
            assert all(fence <= s < pool.num_kv_blocks for s in sources)
            assert all(0 < d < fence for d in destinations)
        elif name == "cancel" and fence is not None:
            pool.cancel_shrink()
            fence = None
        elif name == "end" and fence is not None and pool.advance_shrink(0).num_live_tail == 0:
            pool.finish_shrink()
            assert pool.num_kv_blocks == fence
            fence = None
        assert 0 <= pool.used <= pool.num_kv_blocks - 1
        assert pool.capacity == (pool.num_kv_blocks if fence is None else fence) - 1


def test_a_shrink_copies_its_share_of_live_blocks() -> None:
    """Guards: a shrink that costs nothing, or copies blocks that lie below the fence already."""
    pool = SimPool(101)
    pool.used = 40
    pool.begin_shrink(51)
    assert (pool.capacity, pool.num_kv_blocks) == (50, 101)
    assert [len(pool.advance_shrink(8).copies) for _ in range(4)] == [8, 8, 4, 0]
    pool.finish_shrink()


def test_a_shrink_without_room_waits_for_requests_to_end() -> None:
    """Guards: a shrink that finishes over live blocks, or never does."""
    pool = SimPool(101)
    pool.used = 80
    pool.begin_shrink(51)
    moved = 0
    while copies := pool.advance_shrink(16).copies:
        moved += len(copies)
    # Half of 80 lay above; below there was room for ten.
    assert moved == 10 and pool.advance_shrink(16).num_live_tail == 30
    with pytest.raises(IllegalTransition, match="30 live ones above"):
        pool.finish_shrink()
    pool.release(40)
    assert pool.advance_shrink(16).num_live_tail == 0
    pool.finish_shrink()


@pytest.mark.parametrize(
    ("call", "arguments"),
    [("advance_shrink", [1]), ("finish_shrink", []), ("cancel_shrink", []), ("grow", [10]), ("begin_shrink", [20])],
)
def test_illegal_moves_are_refused(call: str, arguments: list[int]) -> None:
    """Guards: a controller out of step with its pool goes unnoticed."""
    pool = SimPool(20)
    with pytest.raises(IllegalTransition):
        getattr(pool, call)(*arguments)
