"""Layers and KV blocks in pages of device memory that they exchange."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from kv_resize import ArenaBacking, CudaPageAllocator, ElasticCache, KVGeometry, PageAllocator, PagePool
from morphserve.control import largest_batch_bytes, layers_within
from morphserve.residence.base import PartsKey, RankSizes
from morphserve.residence.paged.copier import Copier, CudaCopier
from morphserve.residence.paged.parts import PagedParts
from morphserve.residence.paged.weights import WeightArena
from quant_layers import Build

# Of the device's memory. A level that is staged whole is never seen half done, so every step has graphs of its own.
_RESERVE_SHARE = 0.03
# Of what weights leave for KV and the rest. Where the model takes most of the memory, a reserve of that size would cost
# the burst more blocks than a second of steps in pieces costs its requests.
_RESERVE_SHARE_OF_ROOM = 0.06
# The driver takes as long for a page of 32 MiB as for one of 2 (docs/results/gpu_h100.md): large ones move more bytes a
# second. But a layer's halves are rounded up to pages in each format, and so many blocks come and go as fill pages in
# every layer.
_LEAST_PAGE_BYTES, _MOST_PAGE_BYTES = 2 << 20, 8 << 20
_PAGES_OF_LAYER = 32  # at least, as loaded
_GRANULE_SHARE = 0.005  # of the device, at most


@dataclass(frozen=True, slots=True)
class PagedResidence:
    """Where a rank on a device has its bytes. `Residence`."""

    in_pages: ClassVar[bool] = True

    device: torch.device
    allocator: PageAllocator
    pool: PagePool
    copier: Copier
    background: Executor  # one thread, whose device work goes to the copier's stream
    release_cached: Callable[[], None]  # gives the system what torch's allocator holds and nobody uses
    give_up: Callable[[], None]  # what the page allocator has, when its engine is gone
    total_bytes: int  # of the device, whoever holds them
    allocated: Callable[[], int]  # bytes of the device that torch has given out

    @classmethod
    def open(cls, device: torch.device, forward_stream: Callable[[], object], sizes: RankSizes) -> PagedResidence:
        device = numbered(device)
        copier = CudaCopier(device)
        total = torch.cuda.get_device_properties(device).total_memory
        streams = (forward_stream(), copier.stream)
        allocator = CudaPageAllocator(device.index, streams, page_bytes=page_size(sizes, total))
        thread = start_thread(_on_stream, device, copier.stream)
        thread.submit(_nothing).result()  # a thread that cannot work ends the start, not the first transition
        empty = torch.cuda.empty_cache
        allocated = partial(torch.cuda.memory_allocated, device)
        return cls(device, allocator, PagePool(allocator, 0), copier, thread, empty, allocator.close, total, allocated)

    @property
    def device_type(self) -> str:
        return self.device.type

    @property
    def page_bytes(self) -> int | None:
        return self.allocator.granularity_bytes

    def open_parts(self, key: PartsKey, build: Build) -> PagedParts:
        return PagedParts(WeightArena(self.pool, self.copier), build, self.device, self._make_room)

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def loaded(self, model: torch.nn.Module) -> None:
        return

    def reserve(
        self, sizes: Mapping[str, Sequence[int]], least: int, most: int, memory_share: float, kv_bytes: int | None
    ) -> int | None:
        taken = self.allocated() + self.pool.num_pages * self.allocator.granularity_bytes
        room = kv_bytes or memory_share * self.total_bytes - taken
        limit = min(_RESERVE_SHARE * self.total_bytes, _RESERVE_SHARE_OF_ROOM * room)
        num_layers = layers_within(sizes, least, most, int(limit))
        num_bytes = largest_batch_bytes(sizes, num_layers)
        self._make_room(num_bytes)
        return num_bytes

    def open_cache(self, geometry: KVGeometry, num_blocks: int) -> ElasticCache:
        """Take new memory for `num_blocks` blocks; all that comes later are pages that layers gave up.

        Raises:
            BackingError: the device does not have it.
        """
        backing = ArenaBacking(self.pool, geometry.size_bytes)
        self._make_room(sum(end - start for start, end in geometry.populate_ranges(0, num_blocks)))
        return ElasticCache(backing, geometry, num_blocks)

    def extend_cache(self, cache: ElasticCache, num_blocks: int) -> None:
        pages_of = cache.geometry.populate_ranges
        self._make_room(sum(end - start for start, end in pages_of(cache.num_mapped, num_blocks)))
        cache.map(num_blocks)

    def keep_free(self, num_bytes: int, num_ranks: int) -> None:
        """Do nothing: vLLM has profiled its own, and no page goes to KV that layers did not give up."""

    def wait(self) -> None:
        self.allocator.wait()

    def fence(self) -> AbstractContextManager[None]:
        return self.allocator.fence()

    def finish(self) -> None:
        self.copier.finish()

    def trim(self) -> None:
        """Do nothing: what comes and goes does not lie in the heap."""

    def figures(self) -> dict[str, int]:
        return {"free_page_bytes": self.pool.num_free * self.allocator.granularity_bytes}

    def close(self) -> None:
        """End the thread and give all pages back."""
        self.background.shutdown()
        try:
            self.give_up()
        finally:
            self.copier.close()

    def _make_room(self, num_bytes: int) -> None:
        """Create pages for so many bytes, out of what torch holds and nobody uses."""
        self.release_cached()
        self.pool.create(-(-num_bytes // self.allocator.granularity_bytes))


def page_size(sizes: RankSizes, total_bytes: int) -> int:
    """Return the bytes of a page: more where that is little of a layer, and a change of the KV cache of the device."""
    most = min(_MOST_PAGE_BYTES, sizes.layer_bytes // _PAGES_OF_LAYER)
    size = _LEAST_PAGE_BYTES
    granules = sizes.num_layers / (_GRANULE_SHARE * total_bytes)  # times what blocks come and go by in a layer
    while 2 * size <= most and math.lcm(2 * size, sizes.block_bytes) * granules <= 1:
        size *= 2
    return size


def start_thread(initializer: Callable[..., None] | None = None, *arguments: Any) -> Executor:
    """Return an executor of one thread, for everything that takes pages or waits for the device."""
    return ThreadPoolExecutor(1, "morphserve-pages", initializer, arguments)


def numbered(device: torch.device) -> torch.device:
    """Return the device with its number: vLLM's is "cuda" alone, the rank's current device, which need not be 0."""
    return device if device.index is not None else torch.device(device.type, torch.cuda.current_device())


def _nothing() -> None:
    return


def _on_stream(device: torch.device, stream: Any) -> None:
    """Set the thread's stream: new blocks are cleared beside the forward passes, not between them."""
    torch.cuda.set_device(device)
    torch.cuda.set_stream(stream)
