"""Which kernel runs which format here: what it needs, how it packs, and what a packed weight means.

registry.py says how a new one is added.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from . import packing
from .errors import KernelError
from .linears import (
    Int4TritonLinear,
    Int4VnniLinear,
    Int4WeightOnlyLinear,
    Int8OnednnLinear,
    Int8VnniLinear,
    Int8WeightOnlyLinear,
    LinearImpl,
)
from .neutral import Quant, QuantW4, QuantW8, round_in_pieces
from .registry import register

_INT8_STEPS = 127


def _missing(names: tuple[str, ...]) -> str:
    absent = [name for name in names if not hasattr(torch.ops._C, name)]
    return f"operators not loaded: {', '.join(absent)}" if absent else ""


_CPU_FEATURES = (("_is_vnni_supported", "AVX512-VNNI"), ("_is_avx512_bf16_supported", "AVX512-BF16"))


def _no_vnni() -> str:
    """The VNNI kernels end the process, uncatchably, on a CPU they were not compiled for: ask first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"needs an x86 CPU with AVX512-VNNI and AVX512-BF16, this is {platform.machine()}"
    for query, feature in _CPU_FEATURES:
        supported = getattr(torch.cpu, query, None)
        if supported is None or not supported():
            return f"this CPU has no {feature}"
    return ""


class KernelBase:
    """What the kernels share: dtype and shape gates, declared as class attributes."""

    name: ClassVar[str]
    neutral: ClassVar[type[Quant]]
    format: ClassVar[str]  # that of `neutral`
    quantizes_activations: ClassVar[bool] = True
    slow_on: ClassVar[tuple[str, ...]] = ()
    fast_on: ClassVar[tuple[str, ...]] = ()
    packs_on: ClassVar[str] = ""
    proof_shapes: ClassVar[tuple[tuple[int, int], ...]] = ((960, 576), (576, 1536), (64, 32))
    _dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)
    _ops: ClassVar[tuple[str, ...]] = ()  # of vLLM's extension
    _needs_vnni: ClassVar[bool] = False
    _multiple: ClassVar[int] = 32  # of both N and K
    _groups: ClassVar[tuple[int, ...]] = ()  # input channels that may share a scale; empty: any number

    def __init_subclass__(cls) -> None:
        cls.format = cls.neutral.format

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype

    def unavailable(self) -> str:
        if self.dtype not in self._dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self._dtypes)
            return f"activations are {str(self.dtype).removeprefix('torch.')}, this kernel takes {names}"
        return self._no_device() or _missing(self._ops)

    def _no_device(self) -> str:
        """Why the kernel's operators would fail on this machine, or end the process."""
        return _no_vnni() if self._needs_vnni else ""

    def check_shape(self, n: int, k: int) -> None:
        for label, size in (("N", n), ("K", k)):
            if size <= 0 or size % self._multiple:
                raise KernelError(
                    f"{self.name}: {label}={size} of a weight [N={n}, K={k}] is not a positive multiple of "
                    f"{self._multiple}; leave this linear at base, or choose another tensor-parallel size"
                )

    def check_group(self, size: int) -> None:
        if self._groups and size not in self._groups:
            raise KernelError(
                f"{self.name}: group size {size}, it takes {self._groups}; make the checkpoint with one of them"
            )

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.dim() != 2 or weight.dtype not in (self.dtype, torch.float32):
            raise KernelError(
                f"{self.name} packs a {self.dtype} (or fp32) weight [N, K], got {weight.dtype} {tuple(weight.shape)}; "
                "choose the kernel with the model's dtype"
            )
        self.check_shape(*weight.shape)
        return self.pack_quant(round_in_pieces(self.neutral, weight, self._scale_dtype))

    def pack_quant(self, quant: Quant) -> dict[str, Tensor]:
        raise NotImplementedError

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        raise NotImplementedError

    def reference(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.unpack(tensors).dequantize()

    def activation_half_step(self, x: Tensor) -> Tensor:
        if not self.quantizes_activations:
            return torch.zeros_like(x, dtype=torch.float64)
        return (x.double().abs().amax(dim=1, keepdim=True) / _INT8_STEPS / 2).expand(x.shape)

    @property
    def _scale_dtype(self) -> torch.dtype:
        """Scales are rounded to what the kernel reads before the weights are rounded to them."""
        return torch.float32 if self.quantizes_activations else self.dtype

    def _admit_quant(self, quant: Quant) -> None:
        if type(quant) is not self.neutral:
            raise KernelError(
                f"{self.name} runs {self.format}, this weight is {quant.format}; name it under {quant.format}"
            )
        self.check_shape(*quant.q.shape)
        if isinstance(quant, QuantW4):
            self.check_group(quant.group_size)


class W8A8Vnni(KernelBase):
    """int8 x int8 with per-token activation scales, fused in one operator; plain packed tensors."""

    name, neutral = "w8a8_vnni", QuantW8
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

    name, neutral = "w8a8_onednn", QuantW8
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

    name, neutral = "w8a16_aten", QuantW8
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

    name, neutral = "w4a8_vnni", QuantW4
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

    name, neutral = "w4a16", QuantW4
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

    name, neutral = "w4a16_triton", QuantW4
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


for _kernel in (W8A8Vnni, W8A8Onednn, W8A16, W4A8Vnni, W4A16, W4A16Triton):
    register(_kernel)
