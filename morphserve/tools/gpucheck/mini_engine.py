"""The small decoder with levels: layers that swap their pages, a KV cache that gets them, a graph bank per level."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kv_resize import PagePool
from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.device import (
    Mark,
    Work,
    capture,
    close_pager,
    current_stream,
    graph_pool,
    new_pager,
    on_stream,
    pinned,
    random_weight,
    side_stream,
    synchronize,
)
from morphserve.tools.gpucheck.mini_model import LINEARS, BaseLinear, LayerArena, MiniModel, Shape
from quant_layers import BASE, CANDIDATES, Kernel, LinearImpl, LinearSlot, check_kernel

SMALL = Shape(4, 64, 4, 2, 16, 96, 64, block_size=4, blocks_per_seq=4, batch=4)
_KERNELS = ("w4a16_triton", "fp8a16")  # the first that runs; in a dry run the last, which needs no interpreter


class MiniEngine:
    """Level k runs the first `k * layers_per_level` layers quantized.

    `stage`, `flip` and `retire` are the three steps of a move. Only `flip` belongs between two decode steps, on their
    thread; the others may run beside them, in one other thread.
    """

    def __init__(self, bench: Bench) -> None:
        self.device = bench.device
        self.shape = bench.pick(Shape(), SMALL)
        self.num_levels, self.layers_per_level = bench.pick((3, 2), (2, 1))
        self.batches: Sequence[int] = bench.pick((1, 2, 4, 8, 16), (1, 4))
        self.kernel = _kernel(bench)
        self.level = 0
        self._stream = side_stream(bench.device)
        self._graph_pool = graph_pool(bench.device)
        self._banks: dict[int, dict[int, Work]] = {}
        self._build(bench)

    def _build(self, bench: Bench) -> None:
        s, device = self.shape, bench.device
        morphable = range(self.num_levels * self.layers_per_level)
        example = {name: {"weight": self._weight(0, name)} for name in LINEARS}
        packed = {name: self.kernel.pack(row["weight"]) for name, row in example.items()}
        page = _page_bytes(bench)
        base_pages, quant_pages = (_num_pages(like, page) for like in (example, packed))
        self.reserve_pages = self.layers_per_level * quant_pages
        freed = len(morphable) * (base_pages - quant_pages)
        self.blocks_per_page = page // s.block_bytes
        max_blocks = s.batch * s.blocks_per_seq + freed // s.layers * self.blocks_per_page
        base_kv_pages = s.layers * -(-s.batch * s.blocks_per_seq // self.blocks_per_page)
        self.num_pages = s.layers * base_pages + self.reserve_pages + base_kv_pages
        self.pager = new_pager(bench, self.num_pages, streams=[current_stream(device), self._stream])
        self.pool = PagePool(self.pager, self.num_pages)
        self._base = [LayerArena(self.pool, example, device) for _ in range(s.layers)]
        self._quant = {layer: LayerArena(self.pool, packed, device) for layer in morphable}
        self._masters: dict[int, tuple[Tensor, Tensor]] = {}  # on the host: base, quantized
        self._slots: dict[int, dict[str, LinearSlot]] = {}
        self._impls: dict[int, dict[str, tuple[LinearImpl, LinearImpl]]] = {}  # base, quantized; graphs read them
        for layer, arena in enumerate(self._base):
            self._load(layer, arena)
        self.model = MiniModel(s, self.pool, device, self._slots, max_blocks)

    def _load(self, layer: int, arena: LayerArena) -> None:
        weights = {name: {"weight": self._weight(layer, name)} for name in LINEARS}
        arena.map()
        for name, row in weights.items():
            arena.tensors[name]["weight"].copy_(row["weight"])
        impls = {name: BaseLinear(arena.tensors[name]["weight"]) for name in LINEARS}
        self._slots[layer] = {name: LinearSlot(name, impls[name]) for name in LINEARS}
        if layer not in self._quant:
            return
        here = self._quant[layer].tensors
        self._impls[layer] = {name: (impls[name], self.kernel.build(here[name], None)) for name in LINEARS}
        quantized = {name: self.kernel.pack(row["weight"]) for name, row in weights.items()}
        masters = pinned(arena.num_bytes, self.device), pinned(self._quant[layer].num_bytes, self.device)
        arena.lay_out(weights, masters[0])
        self._quant[layer].lay_out(quantized, masters[1])
        self._masters[layer] = masters

    def _weight(self, layer: int, name: str) -> Tensor:
        return random_weight(*self.shape.linear(name), self.device, seed=100 * layer + LINEARS.index(name))

    # -- decoding -----------------------------------------------------------------------------------------------------

    def capture_bank(self) -> float:
        """Capture this level's graphs; seconds."""
        start = time.perf_counter()
        bank: dict[int, Work] = {}
        for batch in sorted(self.batches, reverse=True):  # the largest first: the others fit into its memory
            self.model.reset()

            def work(batch: int = batch) -> None:
                self.model.step(batch)

            bank[batch] = capture(self.device, work, self._graph_pool)
        synchronize(self.device)
        self._banks[self.level] = bank
        return time.perf_counter() - start

    def decode(self, batch: int | None = None) -> None:
        """Queue one step."""
        self._banks[self.level][batch or self.shape.batch]()

    def generate(self, num_steps: int, first_block: int = 0) -> tuple[Tensor, Tensor]:
        """Tokens [steps, batch], and the hidden states of the last step, from a fresh start."""
        self.model.reset(first_block)
        tokens = []
        for _ in range(num_steps):
            self.decode()
            tokens.append(self.model.tokens.clone())
        synchronize(self.device)
        return torch.stack(tokens), self.model.hidden.clone()

    # -- levels -------------------------------------------------------------------------------------------------------

    def stage(self, target: int) -> None:
        """Map and copy what the neighbouring level needs, beside what runs; returns when it is there."""
        with on_stream(self._stream):
            if target < self.level:
                self.model.cache.unmap(self._blocks_at(target))
            for layer in self._between(self.level, target):
                base, quantized = self._masters[layer]
                arena, master = (
                    (self._quant[layer], quantized) if target > self.level else (self._base[layer], base)
                )
                arena.map()
                arena.bytes.copy_(master, non_blocking=True)
            Mark(self.device).wait()

    def flip(self, target: int) -> Mark:
        """Run the target level from the next step on. The mark passes when no step of the old level runs any more."""
        for layer in self._between(self.level, target):
            for name, slot in self._slots[layer].items():
                base, quantized = self._impls[layer][name]
                slot.impl, slot.format = (quantized, self.kernel.format) if target > self.level else (base, BASE)
        self.level = target
        return Mark(self.device, timed=False)

    def retire(self, source: int, flipped: Mark) -> None:
        """Give the pages of what ran before to the pool, and to KV what the reserve does not need."""
        flipped.wait()
        with on_stream(self._stream):
            for layer in self._between(source, self.level):
                (self._base[layer] if self.level > source else self._quant[layer]).unmap()
            if self.level > source:
                self.model.cache.map(self._blocks_at(self.level))
            Mark(self.device).wait()

    def move(self, target: int) -> None:
        """To any level, step by step, with nothing else running."""
        while self.level != target:
            source = self.level
            self.stage(source + (1 if target > source else -1))
            synchronize(self.device)
            self.retire(source, self.flip(source + (1 if target > source else -1)))

    def restored(self) -> bool:
        """Whether all weights of level 0 are what they were, byte by byte."""
        return all(torch.equal(self._base[layer].bytes.cpu(), base) for layer, (base, _) in self._masters.items())

    def close(self) -> None:
        """Give the device's memory back; the engine is of no use afterwards."""
        self._banks.clear()
        synchronize(self.device)
        close_pager(self.pager)

    def _between(self, one: int, other: int) -> range:
        low, high = sorted((one, other))
        return range(low * self.layers_per_level, high * self.layers_per_level)

    def _blocks_at(self, level: int) -> int:
        gained = level * self.layers_per_level * (self._base[0].num_pages - self._quant[0].num_pages)
        return self.model.base_blocks + gained // self.shape.layers * self.blocks_per_page


def _page_bytes(bench: Bench) -> int:
    """Size of a page, before there is a pager for the pages: how many are needed depends on it."""
    pager = new_pager(bench, 1)
    size = int(pager.granularity_bytes)
    close_pager(pager)
    return size


def _kernel(bench: Bench) -> Kernel:
    by_name: dict[str, Any] = {make.name: make for make in CANDIDATES}
    names = _KERNELS[-1:] if bench.dry else _KERNELS
    for name in names[:-1]:
        kernel: Kernel = by_name[name](torch.bfloat16)
        if check_kernel(kernel, bench.device).ok:
            return kernel
    last: Kernel = by_name[names[-1]](torch.bfloat16)
    return last


def _num_pages(like: dict[str, dict[str, Tensor]], page_bytes: int) -> int:
    """As `LayerArena` lays them out."""
    num_bytes = sum(-(-t.nbytes // 256) * 256 for row in like.values() for t in row.values())
    return -(-num_bytes // page_bytes)
