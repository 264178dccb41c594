"""Which operator runs which format here: packing, building, and the arithmetic each must reproduce.

The operators belong to vLLM's compiled extension. Nothing here imports it: they are looked up by name
when some other code has loaded it, and a kernel whose operators are absent says so.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from . import packing
from .errors import KernelError
from .packing import QuantW4, QuantW8

# Kind of operator, its tensors, bias: what a native caller needs to run a linear without Python.
Native = tuple[str, tuple[Tensor, ...], Tensor | None]


class LinearImpl(Protocol):
    """One linear, ready to run. `nbytes` is what it keeps resident.

    May have a property `native` (see `Native`); without one it can only be called.
    """

    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the dtype of `x`."""
        ...


class Kernel(Protocol):
    """One way to run one format. Instances are bound to the activation dtype."""

    name: str  # also of the packed layout on disk: whoever changes what `pack` gives changes the name
    format: str  # "w8" or "w4"
    dtype: torch.dtype  # of activations, outputs, and weights to pack (or these in fp32)
    quantizes_activations: bool  # to int8, per token

    def unavailable(self) -> str:
        """Why this kernel cannot run here with this dtype, or an empty string."""
        ...

    def check_shape(self, n: int, k: int) -> None:
        """Raise KernelError when a weight [n, k] does not fit this kernel."""
        ...

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantize and lay out a weight [N, K]: plain tensors that can be stored."""
        ...

    def pack_quant(self, quant: QuantW8 | QuantW4) -> dict[str, Tensor]:
        """Lay out a weight that somebody else quantized.

        Raises:
            KernelError: another width than this kernel's, or a shape that does not fit it.
        """
        ...

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        """Make a stored linear callable. Keeps references to `tensors` where the kernel reads them."""
        ...

    def reference(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the stored linear means: fp32 [N, K]."""
        ...


def _op(name: str) -> Callable[..., Any]:
    """The extension's operator, past the overload lookup that each call would repeat."""
    try:
        operator: Callable[..., Any] = getattr(torch.ops._C, name).default
    except AttributeError:
        raise KernelError(
            f"operator _C::{name} is not loaded; load vLLM's CPU extension in this process first"
        ) from None
    return operator


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


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


class _Rows:
    """Shared edge handling. The operators want contiguous [M, K] and fault on M = 0."""

    __slots__ = ("k", "n", "nbytes")

    n: int
    k: int
    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _reshaped(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self.n))
        return self(x.reshape(-1, self.k).contiguous()).view(*x.shape[:-1], self.n)


class _Int8VnniLinear(_Rows):
    __slots__ = ("_bias", "_dtype", "_run", "_scale", "_weight")

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.n, self.k = weight.shape[0], weight.shape[1] - 4
        self._run = _op("int8_scaled_mm_with_quant")
        self._weight, self._scale, self._dtype = weight, scale, dtype
        self._bias = None if bias is None else bias.float()
        self.nbytes = _bytes(weight, scale, self._bias)

    @property
    def native(self) -> Native:
        """For a caller that runs `_C::int8_scaled_mm_with_quant` itself."""
        return "int8_vnni", (self._weight, self._scale), self._bias

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or not x.is_contiguous() or not x.numel():
            return self._reshaped(x)
        out: Tensor = self._run(x, self._weight, self._scale, self._bias, self._dtype, True)
        return out


class _Int4VnniLinear(_Rows):
    __slots__ = ("_bias", "_run", "_scale", "_weight", "_zero")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        self._weight, self._zero, self._scale = tensors["weight"], tensors["zero"], tensors["scale"]
        self._run = _op("int4_scaled_mm_cpu")
        self._bias = None if bias is None else bias.float()
        self.n, self.k = packing.w4_vnni_shape(self._weight)
        self.nbytes = _bytes(self._weight, self._zero, self._scale, self._bias)

    @property
    def native(self) -> Native:
        """For a caller that runs `_C::int4_scaled_mm_cpu` itself."""
        return "int4_vnni", (self._weight, self._zero, self._scale), self._bias

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or not x.is_contiguous() or not x.numel():
            return self._reshaped(x)
        out: Tensor = self._run(x, self._weight, self._zero, self._scale, self._bias)
        return out


class _Int8OnednnLinear(_Rows):
    """Owns a oneDNN matmul, whose reordered weight lives outside torch's tensors."""

    __slots__ = ("_bias", "_handler", "_quantize", "_release", "_run", "_scale")

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.n, self.k = weight.shape
        self._release = _op("release_dnnl_matmul_handler")
        self._quantize, self._run = _op("dynamic_scaled_int8_quant"), _op("onednn_scaled_mm")
        # Arguments: dynamic activation scales, no activation zero point, primitive cache entries.
        create = _op("create_onednn_scaled_mm_handler")
        pointer = create(weight.t(), scale.view(-1, 1), dtype, True, False, 32)
        self._handler = torch.tensor(pointer, dtype=torch.int64)
        self._scale = scale  # the handler does not copy the scales
        self._bias = None if bias is None else bias.to(dtype)
        self.nbytes = weight.nbytes + _bytes(scale, self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or not x.is_contiguous() or not x.numel():
            return self._reshaped(x)
        quantized = torch.empty_like(x, dtype=torch.int8)
        scales = torch.empty((x.shape[0], 1), dtype=torch.float32)
        self._quantize(quantized, x, scales, None)
        out = torch.empty((x.shape[0], self.n), dtype=x.dtype)
        self._run(out, quantized, scales, None, None, self._bias, self._handler)
        return out

    def __del__(self) -> None:
        if hasattr(self, "_handler"):  # absent when the constructor failed
            self._release(self._handler.item())


class _Int4WeightOnlyLinear(_Rows):
    __slots__ = ("_bias", "_run", "_scale", "_weight", "_zero")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight, self._zero, self._scale = tensors["weight"], tensors["zero"], tensors["scale"]
        self._run = _op("cpu_gemm_wna16")
        self._bias = None if bias is None else bias.to(dtype)
        self.n, self.k = self._scale.shape[1], self._weight.shape[1] // 2
        self.nbytes = _bytes(self._weight, self._zero, self._scale, self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or not x.is_contiguous() or not x.numel():
            return self._reshaped(x)
        out = torch.empty((x.shape[0], self.n), dtype=x.dtype)
        self._run(x, self._weight, out, self._scale, self._zero, self._bias, 8, "vec")
        return out


class _Int8WeightOnlyLinear(_Rows):
    __slots__ = ("_bias", "_scale", "_weight")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight, self._scale = tensors["weight"], tensors["scale"].to(dtype)
        self._bias = None if bias is None else bias.to(dtype)
        self.n, self.k = self._weight.shape
        self.nbytes = _bytes(self._weight, self._scale, self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or not x.is_contiguous() or not x.numel():
            return self._reshaped(x)
        out = torch.ops.aten._weight_int8pack_mm.default(x, self._weight, self._scale)
        return out if self._bias is None else out.add_(self._bias)


class _Int4TritonLinear(_Rows):
    __slots__ = ("_bias", "_run", "_scale", "_weight", "_zero")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        from .triton_w4a16 import w4a16_matmul  # Triton only where it is used

        self._run = w4a16_matmul
        self._weight, self._zero, self._scale = tensors["weight"], tensors["zero"], tensors["scale"]
        self._bias = bias
        self.n, self.k = self._weight.shape[1], self._weight.shape[0] * 8
        self.nbytes = _bytes(self._weight, self._zero, self._scale, self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or not x.is_contiguous() or not x.numel():
            return self._reshaped(x)
        return self._run(x, self._weight, self._scale, self._zero, self._bias)


class _Base:
    """What the kernels share: dtype and shape gates, declared as class attributes."""

    name: str
    format: str
    quantizes_activations: bool = True
    _dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    _ops: tuple[str, ...]
    _needs_vnni: bool = False
    _multiple: int = 32  # of both N and K

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype

    def unavailable(self) -> str:
        if self.dtype not in self._dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self._dtypes)
            return f"activations are {str(self.dtype).removeprefix('torch.')}, this kernel takes {names}"
        return (_no_vnni() if self._needs_vnni else "") or _missing(self._ops)

    def check_shape(self, n: int, k: int) -> None:
        for label, size in (("N", n), ("K", k)):
            if size <= 0 or size % self._multiple:
                raise KernelError(
                    f"{self.name}: {label}={size} of a weight [N={n}, K={k}] is not a positive multiple of "
                    f"{self._multiple}; leave this linear at base, or choose another tensor-parallel size"
                )

    def _admit(self, weight: Tensor) -> None:
        if weight.dim() != 2 or weight.dtype not in (self.dtype, torch.float32):
            raise KernelError(
                f"{self.name} packs a {self.dtype} (or fp32) weight [N, K], got {weight.dtype} {tuple(weight.shape)}; "
                "choose the kernel with the model's dtype"
            )
        self.check_shape(*weight.shape)

    def _admit_quant(self, quant: QuantW8 | QuantW4) -> None:
        bits = 8 if isinstance(quant, QuantW8) else 4
        if f"w{bits}" != self.format:
            raise KernelError(f"{self.name} runs {self.format}, this weight has {bits} bits; name it under w{bits}")
        self.check_shape(*quant.q.shape)


class W8A8Vnni(_Base):
    """int8 x int8 with per-token activation scales, fused in one operator; plain packed tensors."""

    name, format = "w8a8_vnni", "w8"
    _dtypes = (torch.bfloat16,)  # with fp16 the operator ends the process
    _ops = ("int8_scaled_mm_with_quant",)
    _needs_vnni = True

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        self._admit(weight)
        return self.pack_quant(packing.quantize_w8(weight))

    def pack_quant(self, quant: QuantW8 | QuantW4) -> dict[str, Tensor]:
        self._admit_quant(quant)
        assert isinstance(quant, QuantW8)
        return {"weight": packing.pack_w8_vnni(quant.q), "scale": quant.scale}

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return _Int8VnniLinear(tensors["weight"], tensors["scale"], bias, self.dtype)

    def reference(self, tensors: Mapping[str, Tensor]) -> Tensor:
        q = packing.unpack_w8_vnni(tensors["weight"])
        return packing.dequantize_w8(packing.QuantW8(q, tensors["scale"]))


class W8A8Onednn(_Base):
    """int8 x int8 through oneDNN: portable, but building reorders the weight (about 1 GiB/s)."""

    name, format = "w8a8_onednn", "w8"
    _ops = (
        "create_onednn_scaled_mm_handler",
        "onednn_scaled_mm",
        "dynamic_scaled_int8_quant",
        "release_dnnl_matmul_handler",
    )
    _multiple = 1

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        self._admit(weight)
        return self.pack_quant(packing.quantize_w8(weight))

    def pack_quant(self, quant: QuantW8 | QuantW4) -> dict[str, Tensor]:
        self._admit_quant(quant)
        assert isinstance(quant, QuantW8)
        return {"weight": quant.q, "scale": quant.scale}

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return _Int8OnednnLinear(tensors["weight"], tensors["scale"], bias, self.dtype)

    def reference(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return packing.dequantize_w8(packing.QuantW8(tensors["weight"], tensors["scale"]))


class W8A16(_Base):
    """8-bit weights, activations as they are: loses a fifth of what W8A8 loses, at twice the time of bf16 in batches.

    Never chosen by itself where a W8A8 kernel runs; name it under `kernels:` where quality counts more than speed.
    """

    name, format = "w8a16_aten", "w8"
    quantizes_activations = False
    _ops = ()
    _multiple = 32

    def unavailable(self) -> str:
        if not hasattr(torch.ops.aten, "_weight_int8pack_mm"):
            return "this torch has no _weight_int8pack_mm"
        return super().unavailable()

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        self._admit(weight)
        return self.pack_quant(packing.quantize_w8(weight))

    def pack_quant(self, quant: QuantW8 | QuantW4) -> dict[str, Tensor]:
        self._admit_quant(quant)
        assert isinstance(quant, QuantW8)
        return {"weight": quant.q, "scale": quant.scale.to(self.dtype)}

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return _Int8WeightOnlyLinear(tensors, bias, self.dtype)

    def reference(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return packing.dequantize_w8(packing.QuantW8(tensors["weight"], tensors["scale"]))


class W4A8Vnni(_Base):
    """4-bit weights with zero points, int8 activations. vLLM offers it with AMX only; VNNI runs it too."""

    name, format = "w4a8_vnni", "w4"
    _ops = ("int4_scaled_mm_cpu",)
    _needs_vnni = True

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        self._admit(weight)
        return self.pack_quant(packing.quantize_w4(weight, packing.choose_group_size(weight.shape[1])))

    def pack_quant(self, quant: QuantW8 | QuantW4) -> dict[str, Tensor]:
        self._admit_quant(quant)
        assert isinstance(quant, QuantW4)
        return packing.pack_w4_vnni(quant)

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return _Int4VnniLinear(tensors, bias)

    def reference(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return packing.dequantize_w4(packing.unpack_w4_vnni(dict(tensors)))


class W4A16(_Base):
    """4-bit weights dequantized on the fly: saves memory, but is slower than bf16 at every batch size."""

    name, format = "w4a16", "w4"
    quantizes_activations = False
    _ops = ("cpu_gemm_wna16",)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        self._admit(weight)
        size = packing.choose_group_size(weight.shape[1])
        return self.pack_quant(packing.quantize_w4(weight, size, scale_dtype=self.dtype))

    def pack_quant(self, quant: QuantW8 | QuantW4) -> dict[str, Tensor]:
        self._admit_quant(quant)
        assert isinstance(quant, QuantW4)
        return packing.pack_w4_int32(QuantW4(quant.q, quant.scale.to(self.dtype), quant.zero))

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return _Int4WeightOnlyLinear(tensors, bias, self.dtype)

    def reference(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return packing.dequantize_w4(packing.unpack_w4_int32(dict(tensors)))


class W4A16Triton(_Base):
    """Our own Triton kernel, for GPUs on which vLLM has no other. Runs on CPU in Triton's interpreter, for tests."""

    name, format = "w4a16_triton", "w4"
    quantizes_activations = False
    _ops = ()

    def unavailable(self) -> str:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if unfit := super().unavailable():
            return unfit
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "needs a GPU (or TRITON_INTERPRET=1, for tests)"
        return ""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        self._admit(weight)
        size = packing.choose_group_size(weight.shape[1])
        return self.pack_quant(packing.quantize_w4(weight, size, scale_dtype=self.dtype))

    def pack_quant(self, quant: QuantW8 | QuantW4) -> dict[str, Tensor]:
        self._admit_quant(quant)
        assert isinstance(quant, QuantW4)
        return packing.pack_w4_columns(QuantW4(quant.q, quant.scale.to(self.dtype), quant.zero))

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return _Int4TritonLinear(tensors, None if bias is None else bias.to(self.dtype))

    def reference(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return packing.dequantize_w4(packing.unpack_w4_columns(dict(tensors)))


CANDIDATES: tuple[type[W8A8Vnni | W8A8Onednn | W8A16 | W4A8Vnni | W4A16 | W4A16Triton], ...] = (
    W8A8Vnni,
    W8A8Onednn,
    W8A16,
    W4A8Vnni,
    W4A16,
    W4A16Triton,
)  # within a format, the first that passes its self-test is used
FORMATS = tuple(dict.fromkeys(kernel.format for kernel in CANDIDATES))
