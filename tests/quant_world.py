"""A small model in plain torch: its store, its swapper, and kernels that can be told to fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from morphserve.residence import PartsKey, StoredParts
from quant_layers import (
    BASE,
    BIAS,
    HALVES,
    Kernel,
    LayerSwapper,
    LinearImpl,
    LinearSlot,
    Part,
    QuantW4,
    QuantW8,
    TensorSlot,
    VariantStore,
    digest,
    half_of,
    quantize_w4,
    quantize_w8,
)

LINEARS = {"self_attn.qkv_proj": (96, 64), "mlp.down_proj": (64, 128)}
NUM_LAYERS = 3


class PlainLinear:
    """A linear over a dense weight."""

    def __init__(self, tensors: Mapping[str, Tensor], dense: Tensor, bias: Tensor | None) -> None:
        self.tensors, self.dense, self.bias = dict(tensors), dense, bias
        self.nbytes = sum(t.nbytes for t in self.tensors.values())

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.float(), self.dense.float(), self.bias)


class FakeKernel:
    """A portable kernel that counts its builds and fails at the one it is told to."""

    dtype = torch.bfloat16
    quantizes_activations = False

    def __init__(self, format: str) -> None:
        self.format, self.name = format, f"fake_{format}"
        self.fail_at = -1
        self.builds = 0

    def unavailable(self) -> str:
        return ""

    def check_shape(self, n: int, k: int) -> None:
        return None

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        if self.format == "w8":
            w8 = quantize_w8(weight)
            return {"weight": w8.q, "scale": w8.scale}
        w4 = quantize_w4(weight, 64)
        return {"weight": w4.q, "scale": w4.scale, "zero": w4.zero}

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        self.builds += 1
        if self.builds == self.fail_at:
            raise MemoryError("out of memory at this linear")
        return PlainLinear(tensors, self.reference(tensors), bias)

    def reference(self, tensors: Mapping[str, Tensor]) -> Tensor:
        if self.format == "w8":
            return QuantW8(tensors["weight"], tensors["scale"]).dequantize()
        return QuantW4(tensors["weight"], tensors["scale"], tensors["zero"]).dequantize()


BuildBase = Callable[[int, str, dict[str, Tensor]], LinearImpl]  # (layer, linear name, stored tensors)


@dataclass(frozen=True, slots=True)
class _SlotBase:
    """`BaseLinear` of a slot that has its base already."""

    slot: LinearSlot

    @property
    def bias(self) -> Tensor | None:
        return None  # these kernels keep the slot's own

    def take(self) -> LinearImpl:
        return self.slot.impl


def swapper_of(
    slots: Mapping[int, Mapping[str, LinearSlot]],
    store: VariantStore,
    kernels: Mapping[str, Kernel],
    build_base: BuildBase,
    tensors: Mapping[int, Mapping[str, TensorSlot]] = MappingProxyType({}),
    look: Any = lambda *_: None,
) -> LayerSwapper:
    """Between what the slots have, their base, and what the store holds."""

    def build(layer: int, name: str, fmt: str, parts: dict[str, Tensor]) -> LinearImpl:
        if fmt == BASE:
            return build_base(layer, name, parts)
        return kernels[fmt].build(parts, parts.pop(BIAS, slots[layer][name].bias))

    names = {fmt: kernel.name for fmt, kernel in kernels.items()}
    parts = StoredParts(store, PartsKey(store.directory, lambda: "fp", names, kernels), build)
    live = {}
    for layer, linears in slots.items():
        for half in HALVES:
            if mine := {name: _SlotBase(slot) for name, slot in linears.items() if half_of(name) == half}:
                part = Part(layer, half, BASE)
                live[part] = parts.adopt(part, mine)  # type: ignore[arg-type]
    return LayerSwapper(slots, live, parts, tensors, look)


class World:
    """A small model, its store and its swapper."""

    def __init__(self, directory: Path, layers: int = NUM_LAYERS) -> None:
        torch.manual_seed(0)
        self.kernels = {"w8": FakeKernel("w8"), "w4": FakeKernel("w4")}
        names = {format: kernel.name for format, kernel in self.kernels.items()}
        self.store = VariantStore.open(directory, "fp", names)
        self.base = {
            layer: {
                name: {"weight": torch.randn(shape).bfloat16(), "bias": torch.randn(shape[0]).bfloat16()}
                for name, shape in LINEARS.items()
            }
            for layer in range(layers)
        }
        self.slots: dict[int, dict[str, LinearSlot]] = {}
        for layer, linears in self.base.items():
            self.store.write(layer, "base", linears)
            for format, kernel in self.kernels.items():
                packed = {name: kernel.pack(t["weight"]) for name, t in linears.items()}
                self.store.write(layer, format, packed, kernel.name)
            self.slots[layer] = {
                name: LinearSlot(name, self.build_base(layer, name, t), bias=t["bias"].float())
                for name, t in linears.items()
            }
        self.swapper = swapper_of(self.slots, self.store, self.kernels, self.build_base)

    def build_base(self, layer: int, name: str, tensors: dict[str, Tensor]) -> LinearImpl:
        return PlainLinear(tensors, tensors["weight"], tensors["bias"].float())

    def impls(self) -> list[int]:
        return [id(slot.impl) for layer in self.slots.values() for slot in layer.values()]

    def base_digest(self) -> str:
        """Of what the slots hold now; meaningful when every layer is at base."""
        held = {}
        for layer, linears in self.slots.items():
            for name, slot in linears.items():
                assert isinstance(slot.impl, PlainLinear)
                held[f"{layer}.{name}"] = slot.impl.tensors
        return digest(held)

    def switch(self, changes: Mapping[int, str]) -> None:
        self.swapper.prepare(changes)
        self.commit()

    def commit(self) -> None:
        self.swapper.commit()
        self.swapper.reclaim()
