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
)
from quant_layers.kernels.int16 import W4Int16, W8Int16
from quant_layers.kernels.plain import W4Plain, W8Plain
from quant_layers.kernels.registry import register


class W8A8Vnni(KernelBase):
    """A kernel of int8 x int8 with per-token activation scales, fused in one operator; plain packed tensors."""

    name, canonical = "w8a8_vnni", QuantW8
    linear = Int8VnniLinear
    _dtypes = (torch.bfloat16,)  # with fp16 the operator ends the process
    _ops = ("int8_scaled_mm_with_quant",)
    _needs_vnni = True

    def lay_out(self, quant: QuantW8) -> dict[str, Tensor]:
        return {"weight": packing.pack_w8_vnni(quant.q), "scale": quant.scale}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return QuantW8(packing.unpack_w8_vnni(tensors["weight"]), tensors["scale"])


class W8A8Onednn(KernelBase):
    """A kernel of int8 x int8 through oneDNN: portable, but building reorders the weight (about 1 GiB/s)."""

    name, canonical = "w8a8_onednn", QuantW8
    linear = Int8OnednnLinear
    _ops = (
        "create_onednn_scaled_mm_handler",
        "onednn_scaled_mm",
        "dynamic_scaled_int8_quant",
        "release_dnnl_matmul_handler",
    )
    _multiples = (1, 1)

    def lay_out(self, quant: QuantW8) -> dict[str, Tensor]:
        return {"weight": quant.q, "scale": quant.scale}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return QuantW8(tensors["weight"], tensors["scale"])


class W8A16(KernelBase):
    """A kernel of 8-bit weights, activations as they are: nothing is lost to rounding them, nor gained in speed.

    Never chosen by itself where a W8A8 kernel runs; name it under `kernels:` where quality counts more than speed.
    """

    name, canonical = "w8a16_aten", QuantW8
    linear = Int8WeightOnlyLinear
    quantizes_activations = False

    def unavailable(self) -> str:
        if not hasattr(torch.ops.aten, "_weight_int8pack_mm"):
            return "this torch has no _weight_int8pack_mm"
        return super().unavailable()

    def lay_out(self, quant: QuantW8) -> dict[str, Tensor]:
        return {"weight": quant.q, "scale": quant.scale.to(self.dtype)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return QuantW8(tensors["weight"], tensors["scale"])


class W4A8Vnni(KernelBase):
    """A kernel of 4-bit weights with zero points, int8 activations. vLLM offers it with AMX only; VNNI runs it too."""

    name, canonical = "w4a8_vnni", QuantW4
    linear = Int4VnniLinear
    _ops = ("int4_scaled_mm_cpu",)
    _needs_vnni = True

    def lay_out(self, quant: QuantW4) -> dict[str, Tensor]:
        return packing.pack_w4_vnni(quant)

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return packing.unpack_w4_vnni(dict(tensors))


class W4A16(KernelBase):
    """A kernel of 4-bit weights dequantized on the fly: saves memory, but is slower than bf16 at every batch size."""

    name, canonical = "w4a16", QuantW4
    linear = Int4WeightOnlyLinear
    quantizes_activations = False
    _ops = ("cpu_gemm_wna16",)

    def lay_out(self, quant: QuantW4) -> dict[str, Tensor]:
        return packing.pack_w4_int32(QuantW4(quant.q, quant.scale.to(self.dtype), quant.zero))

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return packing.unpack_w4_int32(dict(tensors))


class W4A16Triton(KernelBase):
    """A Triton kernel of our own, for GPUs on which vLLM has no other. Runs in Triton's interpreter, for tests."""

    name, canonical = "w4a16_triton", QuantW4
    linear = Int4TritonLinear
    quantizes_activations = False

    def unavailable(self) -> str:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if unfit := super().unavailable():
            return unfit
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "needs a GPU (or TRITON_INTERPRET=1, for tests)"
        return ""

    def lay_out(self, quant: QuantW4) -> dict[str, Tensor]:
        return packing.pack_w4_columns(QuantW4(quant.q, quant.scale.to(self.dtype), quant.zero))

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return packing.unpack_w4_columns(dict(tensors))


# In the order in which they are tried: fast ones first, and what every machine can run last.
for _kernel in (
    W8A8Vnni, W8Int16, W8A8Onednn, W8A16, W8Plain,
    W4A8Vnni, W4Int16, W4A16, W4A16Triton, W4Plain,
):  # fmt: skip
    register(_kernel)
