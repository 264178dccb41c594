"""The fake page allocator and `CudaPageAllocator` over the stub driver as one thing, and what is asked of both."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu.cuda_stub import StubDriver

from kv_resize import ArenaBacking, CudaPageAllocator, ElasticCache, FakePageAllocator, KVResizeError, PagePool

GRANULE = 64
POISON = FakePageAllocator.POISON

AnyAllocator = FakePageAllocator | CudaPageAllocator
MakeAllocator = Callable[[int], AnyAllocator]


def fake(num_pages: int) -> AnyAllocator:
    return FakePageAllocator(num_pages, GRANULE)


def stubbed(num_pages: int) -> AnyAllocator:
    return StubDriver(num_pages * GRANULE, GRANULE).allocator()


ALLOCATORS = pytest.mark.parametrize("make", [fake, stubbed])


def driver_of(allocator: CudaPageAllocator) -> StubDriver:
    driver = allocator._cuda.functions
    assert isinstance(driver, StubDriver)
    return driver


def state(allocator: AnyAllocator) -> tuple[object, ...]:
    """Books and bytes."""
    books = dict(allocator.mapped), set(allocator.accessible), allocator.num_created
    if isinstance(allocator, FakePageAllocator):
        return *books, [bytes(memory.numpy()) for _, memory in allocator._ranges]
    return *books, dict(allocator._ranges), driver_of(allocator).state()


def num_calls(allocator: AnyAllocator) -> int:
    """Calls that can be made to fail."""
    return allocator.num_calls if isinstance(allocator, FakePageAllocator) else len(driver_of(allocator).calls)


def fail_in(allocator: AnyAllocator, later: int) -> None:
    """Let the call after `later` more fail, once."""
    is_fake = isinstance(allocator, FakePageAllocator)
    target: FakePageAllocator | StubDriver = allocator if is_fake else driver_of(allocator)
    target.fail_at = num_calls(allocator) + later


def queue_work(allocator: AnyAllocator) -> None:
    """Work that may touch every page mapped now."""
    if isinstance(allocator, FakePageAllocator):
        allocator.busy = True
    else:
        driver_of(allocator).streams[0].num_queued += 1


def in_thread(call: Callable[[], Any]) -> Any:
    """What a call answers, or raises, in a thread of its own."""
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as e:
            answers.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert answers, "the call did not come back"
    if isinstance(answers[0], BaseException):
        raise answers[0]
    return answers[0]


Call = Callable[[AnyAllocator, int, int, int], object]  # page allocator, a range, a mapped page and one that is not

REFUSED: dict[str, tuple[Call, str]] = {
    "map over a mapping": (lambda p, base, page, free: p.map(base, free), "in use"),
    "map a page twice": (lambda p, base, page, free: p.map(base + GRANULE, page), "in use"),
    "map between pages": (lambda p, base, page, free: p.map(base + GRANULE + 1, free), "granularity"),
    "map before the range": (lambda p, base, page, free: p.map(base - GRANULE, free), "no reserved range"),
    "map behind the range": (lambda p, base, page, free: p.map(base + 4 * GRANULE, free), "no reserved range"),
    "map what was never made": (lambda p, base, page, free: p.map(base + GRANULE, 99), "no page 99"),
    "access from between pages": (lambda p, base, page, free: p.set_access(base + 1, GRANULE), "granularity"),
    "access to half a page": (lambda p, base, page, free: p.set_access(base, GRANULE // 2), "granularity"),
    "access to no page": (lambda p, base, page, free: p.set_access(base, 0), "granularity"),
    "access to the unmapped": (lambda p, base, page, free: p.set_access(base + GRANULE, GRANULE), "nothing is mapped"),
    "access beyond a mapping": (lambda p, base, page, free: p.set_access(base, 2 * GRANULE), "nothing is mapped"),
    "unmap the unmapped": (lambda p, base, page, free: p.unmap(base + GRANULE), "no mapping begins"),
    "unmap from inside": (lambda p, base, page, free: p.unmap(base + 1), "no mapping begins"),
    "reserve half a page": (lambda p, base, page, free: p.reserve(GRANULE // 2), "granularity"),
    "reserve nothing": (lambda p, base, page, free: p.reserve(0), "granularity"),
    "more pages than there are": (lambda p, base, page, free: p.create(), "out of memory"),
    "destroy what is mapped": (lambda p, base, page, free: p.destroy(page), "in use"),
    "destroy what was never made": (lambda p, base, page, free: p.destroy(99), "no page 99"),
    "look behind the range": (lambda p, base, page, free: p.view(base + GRANULE, 4 * GRANULE), "no reserved range"),
    "look before the range": (lambda p, base, page, free: p.view(base - 1, 1), "no reserved range"),
}


def check_books(allocator: AnyAllocator, pool: PagePool, *arenas: ArenaBacking) -> None:
    """Promise 1 of an arena: each page is in the pool or mapped in one arena; usable ones are accessible."""
    held = [page for arena in arenas for page in arena._held.values()]
    assert sorted(held) == sorted(allocator.mapped.values())
    assert sorted([*held, *pool._free]) == list(range(1, allocator.num_created + 1))
    for arena in arenas:
        assert arena._usable <= arena._held.keys()
        assert {arena._at(number) for number in arena._usable} <= set(allocator.accessible)


def grow_and_shrink(cache: ElasticCache, other: ArenaBacking, note: Callable[[], None]) -> None:
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
