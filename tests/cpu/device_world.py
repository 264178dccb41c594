"""A model of three layers and a KV cache on fake pages: forward passes are compared with linears that share nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import Any

import torch
from torch import Tensor

from kv_resize import ArenaBacking, ElasticCache, FakePageAllocator, KVGeometry, PagePool
from morphserve.residence import HostCopier, PagedParts, RankTransition, WeightArena
from quant_layers import (
    BASE,
    CANDIDATES,
    FORMATS,
    HALVES,
    Kernel,
    LayerSwapper,
    LinearImpl,
    LinearSlot,
    LoadedPart,
    Part,
    TensorSlot,
    half_of,
    split_format,
)

PAGE_BYTES = 1024
NUM_LAYERS = 3
SHAPES = {
    "self_attn.qkv_proj": (96, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}
NORM = "post_attention_layernorm"
BLOCK_BYTES = 256  # of one layer: four blocks a page
GRANULARITY = PAGE_BYTES // BLOCK_BYTES
BASE_BLOCKS = 8
MAX_BLOCKS = 64
KERNELS = {"w8": "w8a16_aten", "fp8": "fp8a16"}


def format_of(layer_format: str, name: str) -> str:
    """The format of one linear or norm of a layer."""
    return dict(zip(HALVES, split_format(layer_format), strict=True))[half_of(name)]


class Later(Executor):
    """A background thread that works when it is told to."""

    def __init__(self) -> None:
        self._jobs: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run(self) -> None:
        """All that was asked for, in order."""
        while self._jobs:
            future, work = self._jobs.pop(0)
            try:
                future.set_result(work())
            except Exception as e:
                future.set_exception(e)


def kernel_of(name: str) -> Kernel:
    return next(make for make in CANDIDATES if make.name == name)(torch.bfloat16)


class DeviceWorld:
    """Attributes:
    spare_pages: free while everything is at level 0: what a layer is staged in.
    """

    def __init__(self, spare_pages: int = 24, seed: int = 0, allocator: Any = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kernels = {fmt: kernel_of(name) for fmt, name in KERNELS.items()}
        assert self.kernels.keys() <= FORMATS.keys()
        self.weights = {
            (layer, name): torch.randn(*shape, generator=generator).to(torch.bfloat16) * 0.1
            for layer in range(NUM_LAYERS)
            for name, shape in SHAPES.items()
        }
        self.biases = {layer: torch.randn(96, generator=generator).to(torch.bfloat16) for layer in range(NUM_LAYERS)}
        self.norms = {
            (layer, fmt): torch.rand(64, generator=generator).to(torch.bfloat16) + 0.5
            for layer in range(NUM_LAYERS)
            for fmt in (BASE, "fp8")  # w8 brings no norm of its own
        }
        self.x = {k: torch.randn(5, k, generator=generator).to(torch.bfloat16) for k in (32, 64)}
        self.allocator = allocator or FakePageAllocator(num_pages=1000, granularity_bytes=PAGE_BYTES)
        self.pool = PagePool(self.allocator, 0)
        self.copier = HostCopier()
        self.arena = WeightArena(self.pool, self.copier)
        self.parts = PagedParts(self.arena, self._build, torch.device("cpu"), self._make_room)
        self.live: dict[Part, LoadedPart] = {}
        self.slots = {layer: self._put(layer) for layer in range(NUM_LAYERS)}
        tensors = {layer: {NORM: TensorSlot(self.norms[layer, BASE].clone())} for layer in range(NUM_LAYERS)}
        self.live_norms = {layer: slots[NORM].live for layer, slots in tensors.items()}
        self.swapper = LayerSwapper(self.slots, self.live, self.parts, tensors)
        geometry = KVGeometry.layer_outermost(NUM_LAYERS, BLOCK_BYTES, MAX_BLOCKS, PAGE_BYTES)
        self.backing = ArenaBacking(self.pool, geometry.size_bytes)
        self.pool.create(BASE_BLOCKS // GRANULARITY * NUM_LAYERS + spare_pages)
        self.cache = ElasticCache(self.backing, geometry, BASE_BLOCKS)
        self.later = Later()
        self.rank = RankTransition(self.swapper, WorldKV(self.cache), self.later, fence=self.allocator.fence)

    def _make_room(self, num_bytes: int) -> None:
        self.pool.create(num_bytes // PAGE_BYTES)

    def _put(self, layer: int) -> dict[str, LinearSlot]:
        """Keep a layer in every format; the base gets pages."""
        for fmt in self.kernels:
            self.parts.keep(layer, fmt, lambda fmt=fmt: self._pack(layer, fmt))
        slots: dict[str, LinearSlot] = {}
        for half in HALVES:
            base = Part(layer, half, BASE)
            mine = {name: _Base(self, layer, name) for name in SHAPES if half_of(name) == half}
            self.live[base] = self.parts.adopt(base, mine)  # type: ignore[arg-type]
            for name, impl in self.live[base].linears.items():
                slots[name] = LinearSlot(name, impl, bias=self._bias(layer, name))
        return slots

    def _pack(self, layer: int, fmt: str) -> dict[str, dict[str, Tensor]]:
        packed = {name: self.kernels[fmt].pack(self.weights[layer, name]) for name in SHAPES}
        norm = self.norms.get((layer, fmt))
        return packed if norm is None else packed | {NORM: {"weight": norm}}

    def _bias(self, layer: int, name: str) -> Tensor | None:
        return self.biases[layer] if name == "self_attn.qkv_proj" else None

    def _build(self, layer: int, name: str, fmt: str, tensors: Mapping[str, Tensor]) -> LinearImpl:
        if fmt == BASE:
            return Plain(tensors["weight"], self._bias(layer, name))
        return self.kernels[fmt].build(tensors, self._bias(layer, name))

    def formats(self) -> list[str]:
        """As the swapper tells them."""
        return [fmt for _, fmt in sorted(self.swapper.formats().items())]

    def forward(self) -> dict[Any, Tensor]:
        """What every linear gives now, and the norms; the device is left with work queued."""
        self.allocator.busy = True
        out: dict[Any, Tensor] = {
            (layer, name): slot.impl(self.x[SHAPES[name][1]])
            for layer, slots in self.slots.items()
            for name, slot in slots.items()
        }
        return out | {(layer, NORM): norm.clone() for layer, norm in self.live_norms.items()}

    def expected(self, formats: list[str]) -> dict[Any, Tensor]:
        """The same of linears that were made for it."""
        out: dict[Any, Tensor] = {}
        for layer, layer_format in enumerate(formats):
            for name, (_, k) in SHAPES.items():
                fmt, weight = format_of(layer_format, name), self.weights[layer, name]
                tensors = {"weight": weight} if fmt == BASE else self.kernels[fmt].pack(weight)
                out[layer, name] = self._build(layer, name, fmt, tensors)(self.x[k])
            norm_format = format_of(layer_format, NORM)
            out[layer, NORM] = self.norms.get((layer, norm_format), self.norms[layer, BASE])
        return out

    def check_forward(self, formats: list[str]) -> None:
        """Bit by bit."""
        assert self.formats() == formats
        got, expected = self.forward(), self.expected(formats)
        assert got.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(got[key], tensor), f"{key} at {formats}"

    def check_books(self) -> None:
        """Every page is in the pool or mapped once, and nothing that is in use lacks one."""
        mapped = sorted(self.allocator.mapped.values())
        assert sorted([*mapped, *self.pool._free]) == list(range(1, self.allocator.num_created + 1))
        held = self.swapper.resident_bytes + self.swapper.staging_bytes + self.cache.mapped_bytes
        assert held == len(mapped) * PAGE_BYTES
        assert self.arena.resident_bytes() == held - self.cache.mapped_bytes

    def switch(self, changes: dict[int, str], num_kv_blocks: int | None = None) -> None:
        """A whole transition, background work included."""
        self.rank.prepare(changes)
        self.later.run()
        self.rank.outcome()
        self.rank.commit(True, self.cache.num_mapped if num_kv_blocks is None else num_kv_blocks)
        self.later.run()
        self.rank.outcome()


class _Base:
    """`BaseLinear` of a world's weight."""

    def __init__(self, world: DeviceWorld, layer: int, name: str) -> None:
        self._world, self._layer, self._name = world, layer, name

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self._world.weights[self._layer, self._name]}

    def build(self, tensors: Mapping[str, Tensor]) -> LinearImpl:
        return self._world._build(self._layer, self._name, BASE, tensors)


class Plain:
    """A bf16 linear on a weight that lies where it lies."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self._weight, self._bias)


class WorldKV:
    """`ElasticKV` on a cache, with a word on what was refused."""

    def __init__(self, cache: ElasticCache) -> None:
        self._cache = cache
        self.refused = ""

    @property
    def num_mapped(self) -> int:
        return self._cache.num_mapped

    def map(self, num_blocks: int) -> None:
        self.refused = self._cache.map_at_most(num_blocks)

    def unmap(self, num_blocks: int) -> None:
        if num_blocks < self._cache.num_mapped:
            self._cache.unmap(num_blocks)
