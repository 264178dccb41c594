"""Which kernel runs which format here: what it needs, how it packs, and what a packed weight means.

registry.py says how a new one is added.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from quant_layers.formats import packing
from quant_layers.formats.canonical import Quant, QuantW4, QuantW8
from quant_layers.kernels.base import KernelBase
from quant_layers.kernels.cpu_linears import (
    Int4TritonLinear,
    Int4VnniLinear,
    Int4WeightOnlyLinear,
    Int8OnednnLinear,
    Int8VnniLinear,
    Int8WeightOnlyLinear,
    LinearImpl,
)
from quant_layers.kernels.int16 import W4Int16, W8Int16
from quant_layers.kernels.plain import W4Plain, W8Plain
from quant_layers.kernels.registry import register


class W8A8Vnni(KernelBase):
    """int8 x int8 with per-token activation scales, fused in one operator; plain packed tensors."""

    name, canonical = "w8a8_vnni", QuantW8
    _dtypes = (torch.bfloat16,)  # with fp16 the operator ends the process
    _ops = ("int8_scaled_mm_with_quant",)
    _needs_vnni = True

    def pack_quant(self, quant: Quant) -> dict[str, Tensor]:
        self._admit_quant(quant)
        assert isinstance(quant, QuantW8)
        return {"weight": packing.pack_w8_vnni(quant.q), "scale": quant.scale}

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return Int8VnniLinear(tensors["weight"], tensors["scale"], bias, self.dtype)

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return QuantW8(packing.unpack_w8_vnni(tensors["weight"]), tensors["scale"])


class W8A8Onednn(KernelBase):
    """int8 x int8 through oneDNN: portable, but building reorders the weight (about 1 GiB/s)."""

    name, canonical = "w8a8_onednn", QuantW8
    _ops = (
        "create_onednn_scaled_mm_handler",
        "onednn_scaled_mm",
        "dynamic_scaled_int8_quant",
        "release_dnnl_matmul_handler",
    )
    _multiple = 1

    def pack_quant(self, quant: Quant) -> dict[str, Tensor]:
        self._admit_quant(quant)
        assert isinstance(quant, QuantW8)
        return {"weight": quant.q, "scale": quant.scale}

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return Int8OnednnLinear(tensors["weight"], tensors["scale"], bias, self.dtype)

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return QuantW8(tensors["weight"], tensors["scale"])


class W8A16(KernelBase):
    """8-bit weights, activations as they are: nothing is lost to their rounding, and nothing gained in speed.

    Never chosen by itself where a W8A8 kernel runs; name it under `kernels:` where quality counts more than speed.
    """

    name, canonical = "w8a16_aten", QuantW8
    quantizes_activations = False

    def unavailable(self) -> str:
        if not hasattr(torch.ops.aten, "_weight_int8pack_mm"):
            return "this torch has no _weight_int8pack_mm"
        return super().unavailable()

    def pack_quant(self, quant: Quant) -> dict[str, Tensor]:
        self._admit_quant(quant)
        assert isinstance(quant, QuantW8)
        return {"weight": quant.q, "scale": quant.scale.to(self.dtype)}

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return Int8WeightOnlyLinear(tensors, bias, self.dtype)

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return QuantW8(tensors["weight"], tensors["scale"])


class W4A8Vnni(KernelBase):
    """4-bit weights with zero points, int8 activations. vLLM offers it with AMX only; VNNI runs it too."""

    name, canonical = "w4a8_vnni", QuantW4
    _ops = ("int4_scaled_mm_cpu",)
    _needs_vnni = True

    def pack_quant(self, quant: Quant) -> dict[str, Tensor]:
        self._admit_quant(quant)
        assert isinstance(quant, QuantW4)
        return packing.pack_w4_vnni(quant)

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return Int4VnniLinear(tensors, bias)

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return packing.unpack_w4_vnni(dict(tensors))


class W4A16(KernelBase):
    """4-bit weights dequantized on the fly: saves memory, but is slower than bf16 at every batch size."""

    name, canonical = "w4a16", QuantW4
    quantizes_activations = False
    _ops = ("cpu_gemm_wna16",)

    def pack_quant(self, quant: Quant) -> dict[str, Tensor]:
        self._admit_quant(quant)
        assert isinstance(quant, QuantW4)
        return packing.pack_w4_int32(QuantW4(quant.q, quant.scale.to(self.dtype), quant.zero))

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return Int4WeightOnlyLinear(tensors, bias, self.dtype)

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return packing.unpack_w4_int32(dict(tensors))


class W4A16Triton(KernelBase):
    """Our own Triton kernel, for GPUs on which vLLM has no other. Runs on CPU in Triton's interpreter, for tests."""

    name, canonical = "w4a16_triton", QuantW4
    quantizes_activations = False

    def unavailable(self) -> str:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if unfit := super().unavailable():
            return unfit
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "needs a GPU (or TRITON_INTERPRET=1, for tests)"
        return ""

    def pack_quant(self, quant: Quant) -> dict[str, Tensor]:
        self._admit_quant(quant)
        assert isinstance(quant, QuantW4)
        return packing.pack_w4_columns(QuantW4(quant.q, quant.scale.to(self.dtype), quant.zero))

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return Int4TritonLinear(tensors, None if bias is None else bias.to(self.dtype))

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return packing.unpack_w4_columns(dict(tensors))


# In the order in which they are tried: fast ones first, and what every machine can run last.
for _kernel in (
    W8A8Vnni, W8Int16, W8A8Onednn, W8A16, W8Plain,
    W4A8Vnni, W4Int16, W4A16, W4A16Triton, W4Plain,
):  # fmt: skip
    register(_kernel)
