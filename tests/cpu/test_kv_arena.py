"""Device pages that go between two arenas, and every call of the pager failing once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kv_resize import (
    ArenaBacking,
    BackingError,
    ElasticCache,
    FakePager,
    KVGeometry,
    KVResizeError,
    MapError,
    PagePool,
    PagerError,
)

GRANULE = 64
POISON = FakePager.POISON


def check_books(pager: FakePager, pool: PagePool, *arenas: ArenaBacking) -> None:
    """Promise 1: each page is in the pool or mapped in one arena; usable ones are accessible."""
    held = [page for arena in arenas for page in arena._held.values()]
    assert sorted(held) == sorted(pager.mapped.values())
    assert sorted([*held, *pool._free]) == list(range(1, pager.num_created + 1))
    for arena in arenas:
        assert arena._usable <= arena._held.keys()
        assert {arena._at(number) for number in arena._usable} <= pager.accessible


def test_pages_go_from_weights_to_kv_and_back() -> None:
    """Guards against pages made while serving, bytes of weights in new KV blocks, and pages lost on the way."""
    pager = FakePager(num_pages=10, granularity_bytes=GRANULE)
    pool = PagePool(pager, 10)
    weights, kv = ArenaBacking(pool, 6 * GRANULE), ArenaBacking(pool, 8 * GRANULE)
    for _ in range(3):
        weights.populate([(0, 6 * GRANULE)])
        weights.buffer.fill_(7)
        kv.populate([(0, 4 * GRANULE)])
        kv.buffer[: 4 * GRANULE].fill_(1)
        with pytest.raises(BackingError, match="4 pages of 64 B wanted, 0 are free") as caught:
            kv.populate([(4 * GRANULE, 8 * GRANULE)])
        assert caught.value.available_bytes == 0
        weights.release([(2 * GRANULE, 6 * GRANULE)])
        kv.populate([(4 * GRANULE, 8 * GRANULE)])
        assert not kv.buffer[4 * GRANULE :].any()
        assert (kv.buffer[: 4 * GRANULE] == 1).all() and (weights.buffer[: 2 * GRANULE] == 7).all()
        assert (weights.buffer[2 * GRANULE :] == POISON).all()
        check_books(pager, pool, weights, kv)
        weights.release([(0, 2 * GRANULE)])
        kv.release([(0, 8 * GRANULE)])
        assert pool.num_free == pager.num_created == 10
        check_books(pager, pool, weights, kv)


def test_pages_are_unmapped_after_the_work_that_reads_them() -> None:
    """Guards against unmapping under a step in flight: the driver's calls are not ordered with streams."""
    pager = FakePager(4, GRANULE)
    arena = ArenaBacking(PagePool(pager, 4), 4 * GRANULE)
    arena.populate([(0, 4 * GRANULE)])
    pager.busy = True
    arena.release([(0, GRANULE)])
    assert not pager.busy and arena.resident_bytes([(0, 4 * GRANULE)]) == 3 * GRANULE


@pytest.mark.parametrize("call", range(5))
def test_a_refused_populate_changes_nothing(call: int) -> None:
    """Guards against pages that stay behind in an arena whose owner was told that it got none."""
    pager = FakePager(8, GRANULE)
    pool = PagePool(pager, 8)
    arena = ArenaBacking(pool, 8 * GRANULE)
    pager.fail_at = call
    with pytest.raises(BackingError, match="as planned"):
        arena.populate([(0, 2 * GRANULE), (4 * GRANULE, 5 * GRANULE)])
    assert pool.num_free == 8 and not pager.mapped
    arena.populate([(0, 8 * GRANULE)])
    check_books(pager, pool, arena)


def test_access_is_set_once_for_each_run_of_pages() -> None:
    """Guards against the call that costs most being made for each page."""
    pager = FakePager(8, GRANULE)
    arena = ArenaBacking(PagePool(pager, 8), 8 * GRANULE)
    arena.populate([(0, 3 * GRANULE), (5 * GRANULE, 7 * GRANULE)])
    assert pager.num_calls == 5 + 2


def test_the_granularity_is_the_drivers() -> None:
    """Guards against a fake with pages that no device has."""
    assert FakePager(1).granularity_bytes == 2 << 20


def test_what_could_be_mapped_is_exact() -> None:
    """Guards against a second attempt, with what the first said would fit, that fails too."""
    g = KVGeometry.layer_outermost(3, 40, 12, GRANULE)
    for num_pages in range(6, 24):
        pool = PagePool(FakePager(num_pages, GRANULE), num_pages)
        cache = ElasticCache(ArenaBacking(pool, g.size_bytes), g, 2)
        try:
            cache.map(12)
        except MapError as e:
            possible = e.num_possible
            cache.map(possible)
            with pytest.raises(MapError) as caught:
                cache.map(possible + 1)
            assert caught.value.num_possible == possible


def _scenario(cache: ElasticCache, other: ArenaBacking, note: Callable[[], None]) -> None:
    """Grow, copy, shrink, lend, take back; goes on after each refusal."""
    content = {b: b + 1 for b in range(cache.num_mapped)}

    def write() -> None:
        for b in range(cache.num_mapped):
            for start, end in cache.geometry.byte_ranges(b, b + 1):
                cache.buffer[start:end] = content[b]

    def check() -> None:
        for b in range(cache.num_mapped):
            found = torch.cat([cache.buffer[a:e] for a, e in cache.geometry.byte_ranges(b, b + 1)])
            assert (found == content.get(b, 0)).all(), f"block {b} at {cache.num_mapped} mapped"
        note()

    write()
    for target in (7, 3, 5, 10, 2, 9):
        before = cache.num_mapped
        try:
            (cache.map if target > before else cache.unmap)(target)
        except KVResizeError:
            assert cache.num_mapped == before
        else:
            assert cache.num_mapped == target
        content = {b: value for b, value in content.items() if b < min(before, cache.num_mapped)}
        check()
        content |= {b: b + target for b in range(cache.num_mapped)}
        write()
        if cache.num_mapped > 4:
            cache.copy([(4, 1)])
            content[1] = content[4]
        pages = [(0, 3 * GRANULE)]
        if other.resident_bytes(pages):
            other.release(pages)
        else:
            try:
                other.populate(pages)
            except KVResizeError:
                pass
            else:
                assert not other.buffer[: 3 * GRANULE].any()
                other.buffer[: 3 * GRANULE].fill_(99)
        check()


@pytest.mark.parametrize("layout", [KVGeometry.layer_outermost, KVGeometry.block_outermost])
def test_any_call_may_fail(layout: Callable[[int, int, int, int], KVGeometry]) -> None:
    """Guards against a page lost, mapped twice, used without access, or live KV harmed when the driver refuses."""
    calls = None
    fail_at = -1
    while calls is None or fail_at < calls:
        pager = FakePager(24, GRANULE)
        pool = PagePool(pager, 24)
        g = layout(3, 37, 12, GRANULE)
        kv, other = ArenaBacking(pool, g.size_bytes), ArenaBacking(pool, 4 * GRANULE)
        cache = ElasticCache(kv, g, 2)
        pager.fail_at = None if fail_at < 0 else pager.num_calls + fail_at
        start = pager.num_calls
        _scenario(cache, other, lambda p=pager, q=pool, a=kv, b=other: check_books(p, q, a, b))  # type: ignore[misc]
        if calls is None:
            calls = pager.num_calls - start
            assert calls > 50
        fail_at += 1


def test_fake_pager_refuses_what_the_driver_would() -> None:
    """Guards against a fake that lets pass what kills a process on a device."""
    pager = FakePager(3, GRANULE)
    base = pager.reserve(4 * GRANULE)
    page, second = pager.create(), pager.create()
    pager.map(base, page)
    bad: list[tuple[Callable[[], object], str]] = [
        (lambda: pager.map(base, second), "in use"),
        (lambda: pager.map(base + GRANULE, page), "in use"),
        (lambda: pager.map(base + 1, second), "granularity"),
        (lambda: pager.map(base + 4 * GRANULE, second), "no reserved range"),
        (lambda: pager.unmap(base + GRANULE), "no mapping begins"),
        (lambda: pager.set_access(base, 2 * GRANULE), "nothing is mapped"),
        (lambda: pager.reserve(GRANULE + 1), "granularity"),
        (lambda: [pager.create() for _ in range(2)], "out of memory"),
    ]
    for call, message in bad:
        with pytest.raises(PagerError, match=message):
            call()
    pager.busy = True
    with pytest.raises(PagerError, match="Wait first"):
        pager.unmap(base)
    with pytest.raises(BackingError, match="cannot create 4 pages"):
        PagePool(FakePager(3, GRANULE), 4)


def test_unmapped_bytes_are_not_touched_through_the_arena() -> None:
    """Guards against a copy or a fill of addresses without memory: on a device the process dies of it."""
    arena = ArenaBacking(PagePool(FakePager(4, 10), 4), 40)
    arena.populate([(0, 20)])
    for call in (lambda: arena.copy_rows(0, 10, [(1, 2)]), lambda: arena.zero([(15, 25)])):
        with pytest.raises(BackingError, match="not populated"):
            call()
