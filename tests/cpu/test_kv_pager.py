"""The fake pager and the CUDA pager over a stub driver: both do the same, refuse the same and show the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cpu.pager_world import GRANULE, PAGERS, POISON, REFUSED, AnyPager, MakePager, fake, state, stubbed
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kv_resize import FakePager, PagerError

NUM_SLOTS = 4  # pages in a range


@PAGERS
@pytest.mark.parametrize("name", REFUSED)
def test_each_refusal_changes_nothing(make: MakePager, name: str) -> None:
    """Guards: a pager that lets pass what kills a process on a device, or that does half of what it refuses."""
    call, words = REFUSED[name]
    pager = make(3)
    base, page = pager.reserve(NUM_SLOTS * GRANULE), pager.create()
    pager.reserve(NUM_SLOTS * GRANULE)  # what lies behind a range is not the next one
    free = pager.create()
    pager.map(base, page)
    if name == "more pages than there are":
        pager.create()
    before = state(pager)
    with pytest.raises(PagerError, match=words):
        call(pager, base, page, free)
    assert state(pager) == before


def test_nothing_is_unmapped_under_queued_work() -> None:
    """Guards: a page that a step in flight reads goes away, or stays for ever."""
    pager = FakePager(1, GRANULE)
    base = pager.reserve(GRANULE)
    pager.map(base, pager.create())
    pager.busy = True
    before = state(pager)
    with pytest.raises(PagerError, match="Wait first"):
        pager.unmap(base)
    assert state(pager) == before
    pager.wait()
    pager.unmap(base)
    assert not pager.mapped


@PAGERS
def test_bytes_stay_with_the_page_and_access_with_the_mapping(make: MakePager) -> None:
    """Guards: a pager on which new memory is zero, an unmapped address shows the KV that was there, or a page that
    comes back can be used without access: an arena that relies on it works here and on no device."""
    pager = make(1)
    base, page = pager.reserve(2 * GRANULE), pager.create()
    view = pager.view(base, 2 * GRANULE)
    assert (view == POISON).all()
    pager.map(base, page)
    assert (view == POISON).all() and not pager.accessible
    pager.set_access(base, GRANULE)
    assert set(pager.accessible) == {base} and (view == POISON).all()
    view[:GRANULE].fill_(3)
    pager.unmap(base)
    assert (view == POISON).all() and not pager.accessible
    pager.map(base + GRANULE, page)
    assert not pager.accessible
    pager.set_access(base + GRANULE, GRANULE)
    assert (view[GRANULE:] == 3).all() and (view[:GRANULE] == POISON).all()


@PAGERS
def test_a_destroyed_page_makes_room(make: MakePager) -> None:
    """Guards: memory that is not given back, or the number of a page that is gone given to another."""
    pager = make(1)
    first = pager.create()
    pager.destroy(first)
    assert pager.num_created == 0
    assert pager.create() != first
    with pytest.raises(PagerError, match=f"no page {first}"):
        pager.destroy(first)


SLOTS = st.integers(-1, 2 * NUM_SLOTS + 1)  # from before the first range to behind the second
SLIPS = st.sampled_from([0, 0, 0, 1])  # bytes beside a page's beginning
NUMBERS = st.integers(0, 6)


class BothPagers(RuleBasedStateMachine):
    """Guards: an operation that the fake allows and the CUDA pager does not, or the other way round, so that what was
    tested on one fails on the other; and bytes that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.pagers: list[AnyPager] = [fake(5), stubbed(5)]
        self.ranges = [[pager.reserve(NUM_SLOTS * GRANULE) for _ in range(2)] for pager in self.pagers]

    @rule()
    def create(self) -> None:
        self._both(lambda pager, at: pager.create())

    @rule(page=NUMBERS)
    def destroy(self, page: int) -> None:
        self._both(lambda pager, at: pager.destroy(page))

    @rule(slot=SLOTS, slip=SLIPS, page=NUMBERS)
    def map(self, slot: int, slip: int, page: int) -> None:
        self._both(lambda pager, at: pager.map(at(slot) + slip, page))

    @rule(slot=SLOTS, slip=SLIPS, pages=st.integers(0, NUM_SLOTS + 1), more=SLIPS)
    def set_access(self, slot: int, slip: int, pages: int, more: int) -> None:
        self._both(lambda pager, at: pager.set_access(at(slot) + slip, pages * GRANULE + more))

    @rule(slot=SLOTS, slip=SLIPS)
    def unmap(self, slot: int, slip: int) -> None:
        self._both(lambda pager, at: pager.unmap(at(slot) + slip))

    @rule(slot=st.integers(0, 2 * NUM_SLOTS - 1), value=st.integers(1, 9))
    def write(self, slot: int, value: int) -> None:
        for index, pager in enumerate(self.pagers):
            if self._at(index, slot) in pager.accessible:
                pager.view(self._at(index, slot), GRANULE).fill_(value)

    @invariant()
    def books_and_bytes_are_the_same(self) -> None:
        shown = []
        for index, pager in enumerate(self.pagers):
            places = {self._at(index, slot): slot for slot in range(2 * NUM_SLOTS)}
            seen = {places[a]: bytes(pager.view(a, GRANULE).numpy()) for a in pager.accessible}
            shown.append((pager.num_created, {places[a]: page for a, page in pager.mapped.items()}, seen))
        assert shown[0] == shown[1]

    def _both(self, call: Callable[[AnyPager, Callable[[int], int]], object]) -> None:
        answers: list[object] = []
        for index, pager in enumerate(self.pagers):
            before = state(pager)
            try:
                answers.append(call(pager, lambda slot, index=index: self._at(index, slot)))  # type: ignore[misc]
            except PagerError:
                answers.append("refused")
                assert state(pager) == before
        assert answers[0] == answers[1]

    def _at(self, index: int, slot: int) -> int:
        """Address in one of two ranges; those before and behind are in none."""
        which = int(slot >= NUM_SLOTS)
        return self.ranges[index][which] + (slot - which * NUM_SLOTS) * GRANULE


TestBothPagers = BothPagers.TestCase
