"""A rank in miniature: the product's own pages, weight arena, swapper, elastic cache and background thread.

What integration/worker does for vLLM's model is done here for a small one. Nothing that a transition consists of is
written a second time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kv_resize import ElasticCache, FakePageAllocator, KVGeometry, PagePool
from morphserve.residence import (
    HostCopier,
    PagedResidence,
    PartsKey,
    RankSizes,
    RankTransition,
    WeightSlot,
    register_op,
    reset,
    start_thread,
)
from morphserve.tools.gpucheck.device import linears, random_weight
from morphserve.tools.gpucheck.mini.model import LINEARS, BaseLinear, Shape
from quant_layers import BASE, HALVES, Kernel, LayerSwapper, LinearImpl, LoadedPart, Part, half_of

_DRY_PAGE_BYTES = 4096
_DRY_PAGES = 4096


@dataclass(frozen=True, slots=True)
class Times:
    """Of one swap batch, in seconds."""

    stage_s: float  # from the decision until it could be switched
    switch_s: float  # between two steps: slots and graphs
    settle_s: float  # from the switch until the pages were somebody else's


class MiniRank:
    """Its layers have addresses for their weights as loaded, the first ones also for those that `kernel` packs.

    1. All pages are created while it is built.
    2. Each is in the pool, in a layer or in the KV cache.
    """

    def __init__(self, device: str, shape: Shape, kernel: Kernel, num_morphable: int, batch: int) -> None:
        """
        Args:
            device: on "cpu" pages are booked only, see `FakePageAllocator`.
            shape: of layers and KV blocks.
            kernel: of the one other format.
            num_morphable: layers that can have it.
            batch: most layers that change at a time.
        """
        register_op()
        reset()
        self._device, self._shape, self._kernel = device, shape, kernel
        self._residence = _open(device, shape)
        key = PartsKey(Path(), lambda: "", {}, {kernel.format: kernel})  # of files, of which there are none
        self._parts = self._residence.open_parts(key, self._build)
        self._live: dict[Part, LoadedPart] = {}
        self.weights: list[dict[str, Tensor]] = [{} for _ in range(shape.layers)]
        self._slots = {layer: self._load(layer, layer < num_morphable) for layer in range(shape.layers)}
        self.layer_of = {slot.address: layer for layer, row in self._slots.items() for slot in row.values()}
        self._swapper = LayerSwapper(self._slots, self._live, self._parts)
        self.reserve_pages = batch * self._layer_pages(kernel.format)
        self._residence.pool.create(self.reserve_pages)
        self.cache = self._open_cache(num_morphable)
        held = self._residence
        self._transition = RankTransition(
            self._swapper, _KV(self.cache), held.background, held.finish, fence=held.fence
        )

    def _load(self, layer: int, is_morphable: bool) -> dict[str, WeightSlot]:
        """Put a layer's weights where they stay, one half after the other."""
        if is_morphable:
            self._parts.keep(layer, self._kernel.format, lambda: self._pack(layer))
        slots = {}
        for half in HALVES:
            part = Part(layer, half, BASE)
            mine = {name: _Base(self._make(layer, name)) for name in LINEARS if half_of(name) == half}
            self._live[part] = self._parts.adopt(part, mine)
            for name, base in mine.items():
                self.weights[layer][name] = base.placed.weight
                slots[name] = WeightSlot(f"{layer}.{name}", base.placed, base.placed.weight)
        return slots

    def _pack(self, layer: int) -> dict[str, dict[str, Tensor]]:
        return {name: self._kernel.pack(self._make(layer, name)) for name in LINEARS}

    def _open_cache(self, num_morphable: int) -> ElasticCache:
        """Lay the KV cache out for all layers packed, with new pages for level 0's blocks."""
        s, most = self._shape, self.num_blocks_with(num_morphable)
        geometry = KVGeometry.layer_outermost(s.layers, s.block_bytes, most, self._page_bytes)
        return self._residence.open_cache(geometry, s.num_blocks)

    @property
    def _page_bytes(self) -> int:
        return self._residence.allocator.granularity_bytes

    def _make(self, layer: int, name: str) -> Tensor:
        """Return the weight as loaded: the same in every call."""
        seed = 100 * layer + LINEARS.index(name)
        return random_weight(*self._shape.linear(name), self._device, seed)

    def _build(self, layer: int, name: str, fmt: str, tensors: Mapping[str, Tensor]) -> LinearImpl:
        return self._kernel.build(tensors, None)

    def _layer_pages(self, fmt: str) -> int:
        return sum(self._parts.num_bytes(Part(0, half, fmt)) for half in HALVES) // self._page_bytes

    def num_blocks_with(self, num_packed: int) -> int:
        """KV blocks that there are pages for when so many layers are packed."""
        gained = num_packed * (self._layer_pages(BASE) - self._layer_pages(self._kernel.format))
        blocks_per_page = self._page_bytes // self._shape.block_bytes
        return self._shape.num_blocks + gained // self._shape.layers * blocks_per_page

    def formats(self) -> tuple[str, ...]:
        """Return the formats by layer."""
        return tuple(fmt for _, fmt in sorted(self._swapper.formats().items()))

    def change(
        self,
        formats: Mapping[int, str],
        num_kv_blocks: int,
        switched: Callable[[], None],
        beside: Callable[[], object] | None = None,
    ) -> Times:
        """Carry out one swap batch, by the commands that an engine core sends.

        Args:
            formats: by layer, of those that change.
            num_kv_blocks: to be mapped when all is done.
            switched: called right after the layers are, between the same two steps.
            beside: called while an answer is pending, as steps go on; None: nothing runs meanwhile.

        Raises:
            Exception: what the rank's thread raised.
        """
        start = time.perf_counter()
        if num_kv_blocks < self.cache.num_mapped:
            self._transition.commit(False, num_kv_blocks)
            self._follow(beside)
        self._transition.prepare(formats)
        self._follow(beside)
        staged = time.perf_counter()
        self._transition.commit(True, num_kv_blocks, switched)
        committed = time.perf_counter()
        self._follow(beside)
        return Times(staged - start, committed - staged, time.perf_counter() - committed)

    def _follow(self, beside: Callable[[], object] | None) -> None:
        if beside is None:
            self._transition.wait()
            return
        while self._transition.outcome():
            beside()

    @property
    def num_free(self) -> int:
        """Pages in the pool."""
        return self._residence.pool.num_free

    def num_pages(self) -> int:
        """Pages in the pool, in layers and in the KV cache, by the books of those that hold them."""
        held = self._swapper.resident_bytes + self._swapper.staging_bytes + self.cache.mapped_bytes
        return held // self._page_bytes + self.num_free

    def fresh_linears(self) -> AbstractContextManager[None]:
        """Inside, each linear is one that was made for its present format, in memory that no arena knows of."""
        fresh: dict[WeightSlot, LinearImpl] = {}
        for fmt, (layer, row) in zip(self.formats(), self._slots.items(), strict=True):
            for name, slot in row.items():
                weight = self._make(layer, name)
                fresh[slot] = BaseLinear(weight)
                if fmt != BASE:
                    fresh[slot] = self._build(layer, name, fmt, self._kernel.pack(weight))
        return linears(fresh)

    def is_restored(self) -> bool:
        """Return whether all weights as loaded are what they were, byte by byte."""
        return all(
            torch.equal(weight, self._make(layer, name))
            for layer, row in enumerate(self.weights)
            for name, weight in row.items()
        )

    def close(self) -> None:
        """Give the device's memory back; nothing of the rank may be used any more."""
        self._residence.close()
        reset()


class _KV:
    """`ElasticKV`; unlike a server's, one that does not get its pages fails."""

    def __init__(self, cache: ElasticCache) -> None:
        self._cache = cache

    @property
    def num_mapped(self) -> int:
        return self._cache.num_mapped

    def map(self, num_blocks: int) -> None:
        self._cache.map(num_blocks)

    def unmap(self, num_blocks: int) -> None:
        if num_blocks < self._cache.num_mapped:
            self._cache.unmap(num_blocks)


class _Base:
    """`BaseLinear` of a residence: a weight as loaded, and the linear on it where it was placed."""

    method = "a linear of the check"
    bits = 16
    opaque = True
    bias: Tensor | None = None

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self.placed = BaseLinear(weight)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self._weight}

    def weight(self) -> Tensor:
        return self._weight

    def take(self) -> LinearImpl:
        return self.placed

    def build(self, tensors: Mapping[str, Tensor]) -> LinearImpl:
        self.placed = BaseLinear(tensors["weight"])
        self._weight = self.placed.weight  # what was loaded may go
        return self.placed


def _open(device: str, shape: Shape) -> PagedResidence:
    """Open a rank's pages; in a dry run small ones, so that a small model has many."""
    if device == "cuda":
        layer_bytes = sum(2 * n * k for n, k in map(shape.linear, LINEARS))
        sizes = RankSizes(shape.layers, layer_bytes, shape.block_bytes)
        return PagedResidence.open(torch.device(device), torch.cuda.current_stream, sizes)
    allocator = FakePageAllocator(_DRY_PAGES, _DRY_PAGE_BYTES)
    total_bytes = _DRY_PAGES * _DRY_PAGE_BYTES
    pool, thread, cpu = PagePool(allocator), start_thread(), torch.device("cpu")
    return PagedResidence(cpu, allocator, pool, HostCopier(), thread, _nothing, _nothing, total_bytes, lambda: 0)


def _nothing() -> None:
    return
