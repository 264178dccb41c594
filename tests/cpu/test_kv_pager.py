"""What the fake pager refuses, one by one, and what a page shows on its way."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kv_resize import FakePager, PagerError

GRANULE = 64
POISON = FakePager.POISON


def state(pager: FakePager) -> tuple[object, ...]:
    memory = [bytes(range_.numpy()) for _, range_ in pager._ranges]
    return dict(pager.mapped), set(pager.accessible), pager.num_created, memory


Call = Callable[[FakePager, int, int, int], object]  # pager, a range, a mapped page and one that is not

REFUSED: dict[str, tuple[Call, str]] = {
    "map over a mapping": (lambda p, base, page, free: p.map(base, free), "in use"),
    "map a page twice": (lambda p, base, page, free: p.map(base + GRANULE, page), "in use"),
    "map between pages": (lambda p, base, page, free: p.map(base + GRANULE + 1, free), "granularity"),
    "map before the range": (lambda p, base, page, free: p.map(base - GRANULE, free), "no reserved range"),
    "map behind the range": (lambda p, base, page, free: p.map(base + 4 * GRANULE, free), "no reserved range"),
    "map what was never made": (lambda p, base, page, free: p.map(base + GRANULE, 99), "no page 99"),
    "access from between pages": (lambda p, base, page, free: p.set_access(base + 1, GRANULE), "granularity"),
    "access to half a page": (lambda p, base, page, free: p.set_access(base, GRANULE // 2), "granularity"),
    "access to the unmapped": (lambda p, base, page, free: p.set_access(base + GRANULE, GRANULE), "nothing is mapped"),
    "access beyond a mapping": (lambda p, base, page, free: p.set_access(base, 2 * GRANULE), "nothing is mapped"),
    "unmap the unmapped": (lambda p, base, page, free: p.unmap(base + GRANULE), "no mapping begins"),
    "unmap from inside": (lambda p, base, page, free: p.unmap(base + 1), "no mapping begins"),
    "reserve half a page": (lambda p, base, page, free: p.reserve(GRANULE // 2), "granularity"),
    "more pages than there are": (lambda p, base, page, free: p.create(), "out of memory"),
    "look behind the range": (lambda p, base, page, free: p.view(base + GRANULE, 4 * GRANULE), "no reserved range"),
    "look before the range": (lambda p, base, page, free: p.view(base - 1, 1), "no reserved range"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_refusal_changes_nothing(name: str) -> None:
    """Guards: a fake that lets pass what kills a process on a device, or that does half of what it refuses."""
    call, words = REFUSED[name]
    pager = FakePager(3, GRANULE)
    base, page = pager.reserve(4 * GRANULE), pager.create()
    pager.reserve(4 * GRANULE)  # what lies behind a range is not the next one
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


def test_bytes_stay_with_the_page_and_access_with_the_mapping() -> None:
    """Guards: a fake on which new memory is zero, an unmapped address shows the KV that was there, or a page that
    comes back can be used without access: an arena that relies on it works here and on no device."""
    pager = FakePager(1, GRANULE)
    base, page = pager.reserve(2 * GRANULE), pager.create()
    view = pager.view(base, 2 * GRANULE)
    assert (view == POISON).all()
    pager.map(base, page)
    assert (view == POISON).all() and not pager.accessible
    pager.set_access(base, GRANULE)
    assert pager.accessible == {base}
    view[:GRANULE].fill_(3)
    pager.unmap(base)
    assert (view == POISON).all() and not pager.accessible
    pager.map(base + GRANULE, page)
    assert not pager.accessible
    assert (view[GRANULE:] == 3).all() and (view[:GRANULE] == POISON).all()
