"""The fake page allocator and the CUDA one on a stub driver: both do, refuse and show the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cpu.page_allocator_world import (
    ALLOCATORS,
    GRANULE,
    POISON,
    REFUSED,
    AnyAllocator,
    MakeAllocator,
    fake,
    state,
    stubbed,
)
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kv_resize import FakePageAllocator, PageError

NUM_SLOTS = 4  # pages in a range


@ALLOCATORS
@pytest.mark.parametrize("name", REFUSED)
def test_each_refusal_changes_nothing(make: MakeAllocator, name: str) -> None:
    """Guards: an allocator that lets pass what kills a process on a device, or that does half of what it refuses."""
    call, words = REFUSED[name]
    allocator = make(3)
    base, page = allocator.reserve(NUM_SLOTS * GRANULE), allocator.create()
    allocator.reserve(NUM_SLOTS * GRANULE)  # what lies behind a range is not the next one
    free = allocator.create()
    allocator.map(base, page)
    if name == "more pages than there are":
        allocator.create()
    before = state(allocator)
    with pytest.raises(PageError, match=words):
        call(allocator, base, page, free)
    assert state(allocator) == before


def test_nothing_is_unmapped_under_queued_work() -> None:
    """Guards: a page that a step in flight reads goes away, or stays for ever."""
    allocator = FakePageAllocator(1, GRANULE)
    base = allocator.reserve(GRANULE)
    allocator.map(base, allocator.create())
    allocator.busy = True
    before = state(allocator)
    with pytest.raises(PageError, match="Wait first"):
        allocator.unmap(base)
    assert state(allocator) == before
    allocator.wait()
    allocator.unmap(base)
    assert not allocator.mapped


@ALLOCATORS
def test_bytes_stay_with_the_page_and_access_with_the_mapping(make: MakeAllocator) -> None:
    """Guards: an allocator on which new memory is zero, an unmapped address shows the KV that was there, or a page that
    comes back can be used without access: an arena that relies on it works here and on no device."""
    allocator = make(1)
    base, page = allocator.reserve(2 * GRANULE), allocator.create()
    view = allocator.view(base, 2 * GRANULE)
    assert (view == POISON).all()
    allocator.map(base, page)
    assert (view == POISON).all() and not allocator.accessible
    allocator.set_access(base, GRANULE)
    assert set(allocator.accessible) == {base} and (view == POISON).all()
    view[:GRANULE].fill_(3)
    allocator.unmap(base)
    assert (view == POISON).all() and not allocator.accessible
    allocator.map(base + GRANULE, page)
    assert not allocator.accessible
    allocator.set_access(base + GRANULE, GRANULE)
    assert (view[GRANULE:] == 3).all() and (view[:GRANULE] == POISON).all()


@ALLOCATORS
def test_a_destroyed_page_makes_room(make: MakeAllocator) -> None:
    """Guards: memory that is not given back, or the number of a page that is gone given to another."""
    allocator = make(1)
    first = allocator.create()
    allocator.destroy(first)
    assert allocator.num_created == 0
    assert allocator.create() != first
    with pytest.raises(PageError, match=f"no page {first}"):
        allocator.destroy(first)


SLOTS = st.integers(-1, 2 * NUM_SLOTS + 1)  # from before the first range to behind the second
SLIPS = st.sampled_from([0, 0, 0, 1])  # bytes beside a page's beginning
NUMBERS = st.integers(0, 6)


class BothAllocators(RuleBasedStateMachine):
    """Guards: an operation that the fake allows and the CUDA one does not, or the other way round, so that what was
    tested on one fails on the other; and bytes that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.allocators: list[AnyAllocator] = [fake(5), stubbed(5)]
        self.ranges = [[allocator.reserve(NUM_SLOTS * GRANULE) for _ in range(2)] for allocator in self.allocators]

    @rule()
    def create(self) -> None:
        self._both(lambda allocator, at: allocator.create())

    @rule(page=NUMBERS)
    def destroy(self, page: int) -> None:
        self._both(lambda allocator, at: allocator.destroy(page))

    @rule(slot=SLOTS, slip=SLIPS, page=NUMBERS)
    def map(self, slot: int, slip: int, page: int) -> None:
        self._both(lambda allocator, at: allocator.map(at(slot) + slip, page))

    @rule(slot=SLOTS, slip=SLIPS, pages=st.integers(0, NUM_SLOTS + 1), more=SLIPS)
    def set_access(self, slot: int, slip: int, pages: int, more: int) -> None:
        self._both(lambda allocator, at: allocator.set_access(at(slot) + slip, pages * GRANULE + more))

    @rule(slot=SLOTS, slip=SLIPS)
    def unmap(self, slot: int, slip: int) -> None:
        self._both(lambda allocator, at: allocator.unmap(at(slot) + slip))

    @rule(slot=st.integers(0, 2 * NUM_SLOTS - 1), value=st.integers(1, 9))
    def write(self, slot: int, value: int) -> None:
        for index, allocator in enumerate(self.allocators):
            if self._at(index, slot) in allocator.accessible:
                allocator.view(self._at(index, slot), GRANULE).fill_(value)

    @invariant()
    def books_and_bytes_are_the_same(self) -> None:
        shown = []
        for index, allocator in enumerate(self.allocators):
            places = {self._at(index, slot): slot for slot in range(2 * NUM_SLOTS)}
            seen = {places[a]: bytes(allocator.view(a, GRANULE).numpy()) for a in allocator.accessible}
            shown.append((allocator.num_created, {places[a]: page for a, page in allocator.mapped.items()}, seen))
        assert shown[0] == shown[1]

    def _both(self, call: Callable[[AnyAllocator, Callable[[int], int]], object]) -> None:
        answers: list[object] = []
        for index, allocator in enumerate(self.allocators):
            before = state(allocator)
            try:
                answers.append(call(allocator, lambda slot, index=index: self._at(index, slot)))  # type: ignore[misc]
            except PageError:
                answers.append("refused")
                assert state(allocator) == before
        assert answers[0] == answers[1]

    def _at(self, index: int, slot: int) -> int:
        """Address in one of two ranges; those before and behind are in none."""
        which = int(slot >= NUM_SLOTS)
        return self.ranges[index][which] + (slot - which * NUM_SLOTS) * GRANULE


TestBothAllocators = BothAllocators.TestCase
