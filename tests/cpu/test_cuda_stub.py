"""The stub driver's own rules: `CudaPageAllocator` checks much itself, so its tests do not reach all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cpu.cuda_stub import StubDriver
from cpu.cuda_stub_types import CUmemAccessDesc, CUresult, Opaque
from cpu.page_allocator_world import GRANULE, in_thread

from kv_resize.cuda_driver import access_descriptor, allocation_properties

OK, INVALID = CUresult.CUDA_SUCCESS, CUresult.CUDA_ERROR_INVALID_VALUE


class World:
    """A range of four pages, a mapping of two pages' memory at its beginning, and memory of one page, unmapped."""

    def __init__(self) -> None:
        self.driver = StubDriver(3 * GRANULE, GRANULE)
        self.driver.cuInit(0)
        self.driver.cuCtxSetCurrent(self.driver.cuDevicePrimaryCtxRetain(Opaque(0))[1])
        self.properties = allocation_properties(self.driver, 0)
        self.access: list[CUmemAccessDesc] = [access_descriptor(self.driver, 0)]
        self.base = int(self.driver.cuMemAddressReserve(4 * GRANULE, 0, 0, 0)[1])
        self.used = self.driver.cuMemCreate(2 * GRANULE, self.properties, 0)[1]
        self.free = self.driver.cuMemCreate(GRANULE, self.properties, 0)[1]
        assert self.driver.cuMemMap(self.base, 2 * GRANULE, 0, self.used, 0) == (OK,)

    def map(self, pages_on: float, size: int = GRANULE) -> Any:
        return self.driver.cuMemMap(self.base + int(pages_on * GRANULE), size, 0, self.free, 0)


def changed(struct: Any, **fields: int) -> Any:
    for name, value in fields.items():
        setattr(struct, name, value)
    return struct


def placed(struct: Any, kind: int) -> Any:
    changed(struct.location, type=kind)
    return struct


BROKEN: dict[str, Callable[[World, StubDriver], Any]] = {
    "map over the end of a mapping": lambda w, d: w.map(1),
    "map between pages": lambda w, d: w.map(2.5),
    "map behind the range": lambda w, d: w.map(4),
    "map before the range": lambda w, d: w.map(-1),
    "map more than the memory": lambda w, d: w.map(2, 2 * GRANULE),
    "map half a page": lambda w, d: w.map(2, GRANULE // 2),
    "access to half of a mapping": lambda w, d: d.cuMemSetAccess(w.base, GRANULE, w.access, 1),
    "access to the other half": lambda w, d: d.cuMemSetAccess(w.base + GRANULE, GRANULE, w.access, 1),
    "access beyond a mapping": lambda w, d: d.cuMemSetAccess(w.base, 3 * GRANULE, w.access, 1),
    "access for nobody": lambda w, d: d.cuMemSetAccess(w.base, 2 * GRANULE, [], 0),
    "access to nothing": lambda w, d: d.cuMemSetAccess(w.base, 0, w.access, 1),
    "access of another kind": lambda w, d: d.cuMemSetAccess(w.base, 2 * GRANULE, [changed(w.access[0], flags=1)], 1),
    "access for another place": lambda w, d: d.cuMemSetAccess(w.base, 2 * GRANULE, [placed(w.access[0], 7)], 1),
    "memory of another kind": lambda w, d: d.cuMemCreate(GRANULE, changed(w.properties, type=7), 0)[:1],
    "memory at another place": lambda w, d: d.cuMemCreate(GRANULE, placed(w.properties, 7), 0)[:1],
    "granularity of another kind": lambda w, d: d.cuMemGetAllocationGranularity(w.properties, 7)[:1],
    "unmap half of a mapping": lambda w, d: d.cuMemUnmap(w.base, GRANULE),
    "unmap more than a mapping": lambda w, d: d.cuMemUnmap(w.base, 3 * GRANULE),
    "unmap what is not mapped": lambda w, d: d.cuMemUnmap(w.base + 2 * GRANULE, GRANULE),
    "free a range that is mapped": lambda w, d: d.cuMemAddressFree(w.base, 4 * GRANULE),
    "free a part of a range": lambda w, d: d.cuMemAddressFree(w.base + 2 * GRANULE, 2 * GRANULE),
    "release what is no handle": lambda w, d: d.cuMemRelease(Opaque(5)),
    "reserve half a page": lambda w, d: d.cuMemAddressReserve(GRANULE // 2, 0, 0, 0)[:1],
    "reserve with an odd alignment": lambda w, d: d.cuMemAddressReserve(GRANULE, 3 * GRANULE, 0, 0)[:1],
    "create half a page": lambda w, d: d.cuMemCreate(GRANULE // 2, w.properties, 0)[:1],
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_the_driver_forbids_is_refused(name: str) -> None:
    """Guards: a stub on which a page allocator passes that no device would bear."""
    world = World()
    before = world.driver.state()
    assert BROKEN[name](world, world.driver) == (INVALID,)
    assert world.driver.state() == before


def test_memory_is_limited_and_freed_when_nothing_holds_it() -> None:
    """Guards: a stub with endless memory, or one that frees what is still mapped."""
    w = World()
    d = w.driver
    assert d.cuMemCreate(GRANULE, w.properties, 0) == (CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
    assert d.cuMemRelease(w.used) == (OK,)
    assert d.cuMemCreate(GRANULE, w.properties, 0)[0] == CUresult.CUDA_ERROR_OUT_OF_MEMORY
    assert d.cuMemRelease(w.used) == (INVALID,)
    assert d.cuMemUnmap(w.base, 2 * GRANULE) == (OK,)
    assert d.cuMemAddressFree(w.base, 4 * GRANULE) == (OK,)
    assert d.cuMemCreate(2 * GRANULE, w.properties, 0)[0] == OK


def test_without_access_nothing_is_read_or_written() -> None:
    """Guards: a page allocator that forgets access, or thinks that it stays with a page or an address."""
    w = World()
    d = w.driver
    view = d.view(w.base, 2 * GRANULE)
    view.fill_(1)  # lost, as a device would refuse it
    assert d.cuMemSetAccess(w.base, 2 * GRANULE, w.access, 1) == (OK,)
    assert (view == d.POISON).all()
    view.fill_(2)
    assert d.cuMemUnmap(w.base, 2 * GRANULE) == (OK,)
    assert d.cuMemMap(w.base, 2 * GRANULE, 0, w.used, 0) == (OK,)
    assert (view == d.POISON).all() and not d.accessible
    assert d.cuMemSetAccess(w.base, 2 * GRANULE, w.access, 1) == (OK,)
    assert (view == 2).all()


def test_contexts_are_each_threads_own() -> None:
    """Guards: a stub that lets a thread call without a context, or with one that was released."""
    w = World()
    d = w.driver
    assert in_thread(lambda: d.cuMemUnmap(w.base, 2 * GRANULE)) == (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
    assert d.cuDevicePrimaryCtxRelease(Opaque(0)) == (OK,)
    assert d.cuDevicePrimaryCtxRelease(Opaque(0)) == (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
    assert d.cuCtxSetCurrent("primary context") == (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
    assert d.cuMemUnmap(w.base, 2 * GRANULE) == (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
    assert StubDriver(GRANULE).cuDeviceGet(0) == (CUresult.CUDA_ERROR_NOT_INITIALIZED, None)


def test_unmapping_under_queued_work_is_seen() -> None:
    """Guards: a stub on which nobody need wait."""
    driver = StubDriver(GRANULE, GRANULE)
    allocator = driver.allocator()
    base = allocator.reserve(GRANULE)
    allocator.map(base, allocator.create())
    allocator.set_access(base, GRANULE)
    driver.streams[0].num_queued += 1
    with pytest.raises(AssertionError, match="queued work"):
        allocator.unmap(base)
