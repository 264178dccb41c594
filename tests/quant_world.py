"""A small model in plain torch: its store, its swapper, and kernels that can be told to fail."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quant_layers import (
    LayerSwapper,
    LinearImpl,
    LinearSlot,
    QuantW4,
    QuantW8,
    VariantStore,
    digest,
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
        self.swapper = LayerSwapper(self.slots, self.store, self.kernels, self.build_base)

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
        self.swapper.commit()
