"""Device pages that go between two arenas, and every call of the page allocator or of its driver failing once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cpu.cuda_stub import StubDriver
from cpu.page_allocator_world import (
    ALLOCATORS,
    GRANULE,
    POISON,
    MakeAllocator,
    check_books,
    fail_in,
    grow_and_shrink,
    num_calls,
    queue_work,
)

from kv_resize import (
    ArenaBacking,
    BackingError,
    ElasticCache,
    FakePageAllocator,
    KVGeometry,
    MapError,
    PageError,
    PagePool,
)
from tests.kv_layouts import block_outermost


def test_pages_go_from_weights_to_kv_and_back() -> None:
    """Guards against pages made while serving, bytes of weights in new KV blocks, and pages lost on the way."""
    allocator = FakePageAllocator(num_pages=10, granularity_bytes=GRANULE)
    pool = PagePool(allocator, 10)
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
        check_books(allocator, pool, weights, kv)
        weights.release([(0, 2 * GRANULE)])
        kv.release([(0, 8 * GRANULE)])
        assert pool.num_free == allocator.num_created == 10
        check_books(allocator, pool, weights, kv)


def test_pages_are_unmapped_after_the_work_that_reads_them() -> None:
    """Guards against unmapping under a step in flight: the driver's calls are not ordered with streams."""
    allocator = FakePageAllocator(4, GRANULE)
    arena = ArenaBacking(PagePool(allocator, 4), 4 * GRANULE)
    arena.populate([(0, 4 * GRANULE)])
    allocator.busy = True
    arena.release([(0, GRANULE)])
    assert not allocator.busy and arena.resident_bytes([(0, 4 * GRANULE)]) == 3 * GRANULE


@pytest.mark.parametrize("call", range(5))
def test_a_refused_populate_changes_nothing(call: int) -> None:
    """Guards against pages that stay behind in an arena whose owner was told that it got none."""
    allocator = FakePageAllocator(8, GRANULE)
    pool = PagePool(allocator, 8)
    arena = ArenaBacking(pool, 8 * GRANULE)
    allocator.fail_at = call
    with pytest.raises(BackingError, match="as planned"):
        arena.populate([(0, 2 * GRANULE), (4 * GRANULE, 5 * GRANULE)])
    assert pool.num_free == 8 and not allocator.mapped
    arena.populate([(0, 8 * GRANULE)])
    check_books(allocator, pool, arena)


def test_access_is_set_once_for_each_run_of_pages() -> None:
    """Guards against the call that costs most being made for each page."""
    allocator = FakePageAllocator(8, GRANULE)
    arena = ArenaBacking(PagePool(allocator, 8), 8 * GRANULE)
    arena.populate([(0, 3 * GRANULE), (5 * GRANULE, 7 * GRANULE)])
    assert allocator.num_calls == 5 + 2


def test_the_granularity_is_the_drivers() -> None:
    """Guards against a fake with pages that no device has."""
    assert FakePageAllocator(1).granularity_bytes == 2 << 20


def test_what_could_be_mapped_is_exact() -> None:
    """Guards against a second attempt, with what the first said would fit, that fails too."""
    g = KVGeometry.layer_outermost(3, 40, 12, GRANULE)
    for num_pages in range(6, 24):
        pool = PagePool(FakePageAllocator(num_pages, GRANULE), num_pages)
        cache = ElasticCache(ArenaBacking(pool, g.size_bytes), g, 2)
        try:
            cache.map(12)
        except MapError as e:
            possible = e.num_possible
            cache.map(possible)
            with pytest.raises(MapError) as caught:
                cache.map(possible + 1)
            assert caught.value.num_possible == possible


@ALLOCATORS
@pytest.mark.parametrize("layout", [KVGeometry.layer_outermost, block_outermost])
def test_any_call_may_fail(make: MakeAllocator, layout: Callable[[int, int, int, int], KVGeometry]) -> None:
    """Guards against a page lost, mapped twice, used without access, unmapped under work, or live KV harmed when the
    driver refuses."""

    def run(fail_at: int | None) -> int:
        allocator = make(24)
        pool = PagePool(allocator, 24)
        g = layout(3, 37, 12, GRANULE)
        kv, other = ArenaBacking(pool, g.size_bytes), ArenaBacking(pool, 4 * GRANULE)
        cache = ElasticCache(kv, g, 2)
        start = num_calls(allocator)
        if fail_at is not None:
            fail_in(allocator, fail_at)

        def note() -> None:
            check_books(allocator, pool, kv, other)
            queue_work(allocator)

        grow_and_shrink(cache, other, note)
        return num_calls(allocator) - start

    calls = run(None)
    assert calls > 50
    for fail_at in range(calls):
        run(fail_at)


def test_fake_allocator_refuses_what_the_driver_would() -> None:
    """Guards against a fake that lets pass what kills a process on a device."""
    allocator = FakePageAllocator(3, GRANULE)
    base = allocator.reserve(4 * GRANULE)
    page, second = allocator.create(), allocator.create()
    allocator.map(base, page)
    bad: list[tuple[Callable[[], object], str]] = [
        (lambda: allocator.map(base, second), "in use"),
        (lambda: allocator.map(base + GRANULE, page), "in use"),
        (lambda: allocator.map(base + 1, second), "granularity"),
        (lambda: allocator.map(base + 4 * GRANULE, second), "no reserved range"),
        (lambda: allocator.unmap(base + GRANULE), "no mapping begins"),
        (lambda: allocator.set_access(base, 2 * GRANULE), "nothing is mapped"),
        (lambda: allocator.reserve(GRANULE + 1), "granularity"),
        (lambda: [allocator.create() for _ in range(2)], "out of memory"),
    ]
    for call, message in bad:
        with pytest.raises(PageError, match=message):
            call()
    allocator.busy = True
    with pytest.raises(PageError, match="Wait first"):
        allocator.unmap(base)
    with pytest.raises(BackingError, match="cannot create 4 pages"):
        PagePool(FakePageAllocator(3, GRANULE), 4)


def test_unmapped_bytes_are_not_touched_through_the_arena() -> None:
    """Guards against a copy or a fill of addresses without memory: on a device the process dies of it."""
    arena = ArenaBacking(PagePool(FakePageAllocator(4, 10), 4), 40)
    arena.populate([(0, 20)])
    for call in (lambda: arena.copy_rows(0, 10, [(1, 2)]), lambda: arena.zero([(15, 25)])):
        with pytest.raises(BackingError, match="not populated"):
            call()


@ALLOCATORS
def test_a_pool_is_filled_at_two_moments(make: MakeAllocator) -> None:
    """Guards against a pool that forgets what it had when more is made, and arenas that must wait for their pages."""
    allocator = make(8)
    pool = PagePool(allocator)
    weights = ArenaBacking(pool, 4 * GRANULE)
    assert pool.num_free == 0
    pool.create(4)
    weights.populate([(0, 4 * GRANULE)])
    pool.create(4)
    assert (pool.num_free, allocator.num_created) == (4, 8)
    kv = ArenaBacking(pool, 8 * GRANULE)
    weights.release([(0, 2 * GRANULE)])
    kv.populate([(0, 6 * GRANULE)])
    check_books(allocator, pool, weights, kv)


@ALLOCATORS
def test_pages_are_created_all_or_none(make: MakeAllocator) -> None:
    """Guards against pages that belong to nobody after a refusal: memory that no one can use until the process ends."""
    allocator = make(8)
    pool = PagePool(allocator, 3)
    with pytest.raises(BackingError, match=r"cannot create 6 pages of 64 B, 5 could .*out of memory") as caught:
        pool.create(6)
    assert caught.value.available_bytes == 5 * GRANULE
    assert pool.num_free == allocator.num_created == 3
    pool.create(5)
    assert pool.num_free == allocator.num_created == 8


def test_a_page_that_cannot_be_destroyed_stays_in_the_pool(caplog: pytest.LogCaptureFixture) -> None:
    """Guards against the same when the driver refuses to take a page back, too."""
    driver = StubDriver(4 * GRANULE, GRANULE)
    allocator = driver.allocator()
    pool = PagePool(allocator)
    driver.fail_at = len(driver.calls) + 5  # after 4 pages and the refusal of a fifth: the first release
    with pytest.raises(BackingError, match="4 could be made"):
        pool.create(6)
    assert driver.calls[-4:] == ["cuMemRelease"] * 4 and "stays in the pool" in caplog.text
    assert pool.num_free == allocator.num_created == len(driver.memories) == 1
    check_books(allocator, pool)


@ALLOCATORS
def test_an_arena_that_does_not_clear_shows_what_the_page_held(make: MakeAllocator) -> None:
    """Guards against weights' pages being zeroed for nothing, and an arena of KV that takes over not clearing."""
    pool = PagePool(make(2), 2)
    weights, kv = ArenaBacking(pool, 2 * GRANULE, clears=False), ArenaBacking(pool, 2 * GRANULE)
    weights.populate([(0, 2 * GRANULE)])
    assert (weights.buffer == POISON).all()
    for value in (5, 6):
        weights.buffer.fill_(value)
        weights.release([(0, 2 * GRANULE)])
        weights.populate([(0, 2 * GRANULE)])
        assert (weights.buffer == value).all()
    weights.release([(0, GRANULE)])
    kv.populate([(0, GRANULE)])
    assert not kv.buffer[:GRANULE].any()
    assert (weights.buffer[GRANULE:] == 6).all()


def test_pages_stay_when_the_work_on_them_is_not_known_to_be_done(caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a release that raises, which no caller expects, or unmaps under work not known to be done."""
    driver = StubDriver(2 * GRANULE, GRANULE)
    allocator = driver.allocator()
    pool = PagePool(allocator, 2)
    arena = ArenaBacking(pool, 2 * GRANULE)
    arena.populate([(0, 2 * GRANULE)])
    queue_work(allocator)
    for later in (0, 1):  # the event's record, its synchronize
        fail_in(allocator, later)
        arena.release([(0, GRANULE)])
        assert "cannot be given back" in caplog.text and pool.num_free == 0
        check_books(allocator, pool, arena)
        with pytest.raises(BackingError, match="not populated"):
            arena.zero([(0, GRANULE)])
        caplog.clear()
    arena.populate([(0, GRANULE)])
    assert not arena.buffer[:GRANULE].any()
    arena.release([(0, 2 * GRANULE)])
    assert pool.num_free == 2 and not allocator.mapped


def test_all_arenas_go_when_the_allocator_is_closed() -> None:
    """Guards against device memory that stays behind a stopped engine, however its arenas were filled."""
    driver = StubDriver(24 * GRANULE, GRANULE)
    g = KVGeometry.layer_outermost(3, 37, 12, GRANULE)
    with driver.allocator() as allocator:
        pool = PagePool(allocator, 22)
        cache = ElasticCache(ArenaBacking(pool, g.size_bytes), g, 7)
        other = ArenaBacking(pool, 4 * GRANULE, clears=False)
        other.populate([(0, GRANULE)])
        queue_work(allocator)
        cache.unmap(3)
        queue_work(allocator)
    assert driver.state() == (0, {}, {}, {}, set(), {})
