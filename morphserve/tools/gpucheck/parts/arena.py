"""T1: an arena on the device's pages: tensors over reserved addresses, growing and shrinking, graphs that live on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kv_resize import ArenaBacking, PagePool
from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.device import MIB, capture, free_bytes, open_page_allocator, require_device, synchronize


def run(bench: Bench) -> None:
    """See the module."""
    require_device(bench)
    num_pages = bench.pick(256, 16)
    with open_page_allocator(bench, num_pages) as allocator:
        before = free_bytes(bench.device)
        times: list[float] = []
        pool = PagePool(_Timed(allocator, times), num_pages)
        bench.figure("create a page", "us", times)
        created = num_pages * allocator.granularity_bytes
        if not bench.dry:
            taken = before - free_bytes(bench.device)
            bench.figure("memory taken by pages", "MiB", taken / MIB)
            bench.require("pages are device memory", taken >= created, f"{taken:,} B for {created:,} B of pages")
        _check_arena(bench, allocator, pool, num_pages)
        _time_calls(bench, allocator, pool, num_pages)
        bench.require("every page is back in the pool", pool.num_free == num_pages, f"{pool.num_free} of {num_pages}")
        if not bench.dry:
            _check_no_memory_moved(bench, before, created)
            open_bytes = free_bytes(bench.device)
    if not bench.dry:
        given = free_bytes(bench.device) - open_bytes
        bench.require("close gives the memory back", given >= created, f"{given:,} B of {created:,} B")


class _Timed:
    """A page allocator whose `create` is timed."""

    def __init__(self, allocator: Any, times: list[float]) -> None:
        self._allocator, self._times = allocator, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._allocator, name)

    def create(self) -> Any:
        """Create a page, and note the time."""
        start = time.perf_counter()
        page = self._allocator.create()
        self._times.append((time.perf_counter() - start) * 1e6)
        return page


def _check_arena(bench: Bench, allocator: Any, pool: PagePool, num_pages: int) -> None:
    page = allocator.granularity_bytes
    arena = ArenaBacking(pool, num_pages * page)
    small = num_pages // 4
    arena.populate([(0, small * page)])
    bench.require("new pages are zero", not bool(arena.buffer[: small * page].any()))
    address = arena.buffer.data_ptr()
    rows = arena.buffer.view(torch.int32).view(num_pages, page // 4)
    for number in range(small):
        rows[number].fill_(number + 1)

    # As attention finds its blocks: through a table that is read when the graph runs.
    table = torch.zeros(4, dtype=torch.int64, device=bench.device)
    out = torch.zeros(4, page // 4, dtype=torch.int32, device=bench.device)
    replay = capture(bench.device, lambda: _gather(rows, table, out))

    def seen(*numbers: int) -> list[int]:
        table.copy_(torch.tensor(numbers, device=bench.device))
        out.fill_(-1)
        replay()
        synchronize(bench.device)
        if bool((out != out[:, :1]).any()):
            return []
        return [int(value) for value in out[:, 0].tolist()]

    bench.require("a graph reads pages", seen(0, 1, 2, small - 1) == [1, 2, 3, small], "through a table of rows")
    arena.populate([(small * page, num_pages * page)])
    bench.require("grown pages are zero", not bool(arena.buffer[small * page :].any()))
    for number in range(small, num_pages):
        rows[number].fill_(1000 + number)
    last = num_pages - 1
    found, expected = seen(0, small, last, 1), [1, 1000 + small, 1000 + last, 2]
    detail = f"read {found}, written {expected}"
    bench.require("the graph captured before reads pages mapped after", found == expected, detail)
    arena.release([(small * page, num_pages * page)])
    found = seen(0, 1, 2, small - 1)
    bench.require("what stays survives a shrink", found == [1, 2, 3, small], str(found))
    arena.populate([(2 * small * page, 3 * small * page)])
    rows[2 * small].fill_(77)
    found = seen(2 * small, 0, 2 * small, 1)
    bench.require("and pages that came back", found == [77, 1, 77, 2], f"{found}")
    bench.require("addresses never change", arena.buffer.data_ptr() == address, f"{address:#x}")
    _check_thread(bench, arena, small * page)
    synchronize(bench.device)
    arena.release([(0, num_pages * page)])


def _gather(rows: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    torch.index_select(rows, 0, table, out=out)


def _check_thread(bench: Bench, arena: ArenaBacking, middle: int) -> None:
    """Map, write and unmap from another thread: the driver's context is one per thread."""
    failures: list[str] = []

    def work() -> None:
        try:
            arena.populate([(middle, 2 * middle)])
            arena.buffer[middle : 2 * middle].fill_(5)
            synchronize(bench.device)
            if not bool((arena.buffer[middle : 2 * middle] == 5).all()):
                failures.append("what was written is not there")
            arena.release([(middle, 2 * middle)])
        except Exception as e:  # whatever it is, it is the finding
            failures.append(f"{type(e).__name__}: {e}")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    bench.require("another thread can map and unmap", not failures, "; ".join(failures))


def _time_calls(bench: Bench, allocator: Any, pool: PagePool, num_pages: int) -> None:
    """Time the page allocator's calls alone, one page at a time, nothing queued."""
    page_bytes = allocator.granularity_bytes
    address = allocator.reserve(num_pages * page_bytes)
    times: dict[str, list[float]] = {"map": [], "set_access": [], "unmap": []}
    runs: list[float] = []
    pages = pool.take(num_pages)
    for turn in range(bench.pick(8, 2)):
        places = [address + number * page_bytes for number in range(num_pages)]
        for place, page in zip(places, pages, strict=True):
            _time(times["map"], partial(allocator.map, place, page))
        if turn % 2:
            _time(runs, partial(allocator.set_access, address, num_pages * page_bytes))
        else:
            for place in places:
                _time(times["set_access"], partial(allocator.set_access, place, page_bytes))
        allocator.wait()
        for place in places:
            _time(times["unmap"], partial(allocator.unmap, place))
    pool.give(pages)
    for name, values in times.items():
        bench.figure(f"{name}, a page of {page_bytes // 1024} KiB", "us", values)
    bench.figure(f"set_access, {num_pages} pages in one call", "us", runs)


def _time(into: list[float], call: Callable[[], object]) -> None:
    start = time.perf_counter()
    call()
    into.append((time.perf_counter() - start) * 1e6)


def _check_no_memory_moved(bench: Bench, before: int, created: int) -> None:
    """Growing and shrinking moved pages and took no memory; graphs and torch keep a little."""
    extra = before - free_bytes(bench.device) - created
    bench.require("no memory is taken while pages move", extra < 512 * MIB, f"{extra:,} B beyond the pages")
