"""T2: does decode notice pages that another thread maps, unmaps and moves? Nothing that runs touches those pages."""

from __future__ import annotations

import threading
import time
from typing import Any

from kv_resize import PagePool
from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.device import MIB, open_page_allocator, require_device
from morphserve.tools.gpucheck.mini.decode_loop import DecodeLoop, Steps, compare

_CALLS = ("unmap", "map", "set_access")


def run(bench: Bench) -> None:
    """See the module."""
    require_device(bench)
    loop = DecodeLoop(bench)
    bench.figure("weights read in a step", "MiB", loop.weight_bytes / MIB)
    loop.run(bench.pick(200, 2))
    reference = loop.out.clone()
    sizes = bench.pick((2 * MIB, 8 * MIB, 32 * MIB), (4096, 8192))
    for number, page_bytes in enumerate(sizes):
        _one_size(bench, loop, page_bytes, bench.left_s * 0.9 / (len(sizes) - number))
    loop.run(1)
    bench.require("the loop computes what it did before", bool((loop.out == reference).all()), "bit by bit")


def _one_size(bench: Bench, loop: DecodeLoop, page_bytes: int, seconds: float) -> None:
    name = f"pages of {page_bytes // MIB} MiB" if page_bytes >= MIB else f"pages of {page_bytes} B"
    num_pages = bench.pick(max(32, 256 * MIB // page_bytes), 4)
    with open_page_allocator(bench, num_pages, page_bytes) as allocator:
        mover = Mover(allocator, num_pages)

        def beside(num_steps: int) -> Steps:
            with mover:
                return loop.run(num_steps)

        compare(bench, loop, seconds, beside, bench.pick(60, 3)).report(bench, f"{name} that move")
        bench.require(f"{name}: no call failed", not mover.error, mover.error)
        bench.require(f"{name}: they did move", mover.num_moved > 0, f"{mover.num_moved} moves")
        for call in _CALLS:
            bench.figure(f"{call}, {name}, beside decode", "us", mover.times_us[call] or [0.0])
        bench.figure(f"{name} moved in a second", "1/s", mover.num_moved / max(mover.seconds, 1e-9))


class Mover:
    """Inside a `with` block, a thread moves pages between two ranges, one after the other, without a pause."""

    def __init__(self, allocator: Any, num_pages: int) -> None:
        self._allocator = allocator
        page_bytes = allocator.granularity_bytes
        self._ranges = [allocator.reserve(num_pages * page_bytes) for _ in range(2)]
        self._pages = PagePool(allocator, num_pages).take(num_pages)
        self._at = 0  # the range in which the pages are mapped
        self._next = 0  # the page to be moved next
        for number, page in enumerate(self._pages):
            allocator.map(self._address(0, number), page)
        allocator.set_access(self._ranges[0], num_pages * page_bytes)
        self.times_us: dict[str, list[float]] = {call: [] for call in _CALLS}
        self.num_moved = 0
        self.seconds = 0.0
        self.error = ""
        self._stop = threading.Event()
        self._moved = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Mover:
        self._stop.clear()
        self._moved.clear()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        # The steps are beside moves from the first on.
        self._moved.wait(timeout=10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()

    def _address(self, which: int, number: int) -> int:
        return int(self._ranges[which] + number * self._allocator.granularity_bytes)

    def _work(self) -> None:
        start = time.perf_counter()
        try:
            while not self._stop.is_set():
                self._move_one()
                self._moved.set()
        except Exception as e:  # the driver's, say: it is the finding
            self.error = f"{type(e).__name__}: {e}"
            self._moved.set()
        self.seconds += time.perf_counter() - start

    def _move_one(self) -> None:
        number, target = self._next, 1 - self._at
        begin = time.perf_counter()
        self._allocator.unmap(self._address(self._at, number))
        unmapped = time.perf_counter()
        self._allocator.map(self._address(target, number), self._pages[number])
        mapped = time.perf_counter()
        self._allocator.set_access(self._address(target, number), self._allocator.granularity_bytes)
        end = time.perf_counter()
        for call, us in zip(_CALLS, (unmapped - begin, mapped - unmapped, end - mapped), strict=True):
            self.times_us[call].append(us * 1e6)
        self.num_moved += 1
        self._next = (number + 1) % len(self._pages)
        if not self._next:
            self._at = target
