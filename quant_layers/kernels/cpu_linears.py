"""Linears in the layouts of the kernels, ready to run.

The operators belong to vLLM's compiled extension, to torch, or to Triton. Nothing here imports vLLM: its operators
are looked up by name when some other code has loaded them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from quant_layers.errors import KernelError
from quant_layers.formats import packing

# Kind of operator, its tensors, bias: what a native caller needs to run a linear without Python.
Native = tuple[str, tuple[Tensor, ...], Tensor | None]
# vLLM's ids of unsigned types (vllm/scalar_type.py): mantissa from bit 8 on, bias from 17 on, NaNs from 50 on.
UINT4_ID = (4 << 8) | (1 << 50)
UINT8B128_ID = (8 << 8) | (128 << 17) | (1 << 50)


class LinearImpl(Protocol):
    """A linear, ready to run. `nbytes` is what it keeps resident.

    May have a property `native` (see `Native`); without one it can only be called.
    """

    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N], in the dtype of `x`."""
        ...


def _op(name: str) -> Callable[..., Any]:
    """Return the extension's operator, past the overload lookup that each call would repeat."""
    try:
        operator: Callable[..., Any] = getattr(torch.ops._C, name).default
    except AttributeError:
        raise KernelError(f"operator _C::{name} is not loaded; load vLLM's extension in this process first") from None
    return operator


def bias_in(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def nbytes_of(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


class Rows:
    """The edges that all linears share: operators want contiguous [M, K] and fault on M = 0."""

    __slots__ = ("k", "n", "nbytes")

    n: int
    k: int
    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() == 2 and x.is_contiguous() and x.numel():
            return self.rows(x)
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self.n))
        return self.rows(x.reshape(-1, self.k).contiguous()).view(*x.shape[:-1], self.n)

    def rows(self, x: Tensor) -> Tensor:
        """Map contiguous [M, K], M > 0, to [M, N]."""
        raise NotImplementedError


class Int8VnniLinear(Rows):
    __slots__ = ("_bias", "_dtype", "_run", "_scale", "_weight")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        weight, scale = tensors["weight"], tensors["scale"]
        self.n, self.k = weight.shape[0], weight.shape[1] - 4
        self._run = _op("int8_scaled_mm_with_quant")
        self._weight, self._scale, self._dtype = weight, scale, dtype
        self._bias = bias_in(bias, torch.float32)
        self.nbytes = nbytes_of(weight, scale, self._bias)

    @property
    def native(self) -> Native:
        """Arguments for a caller that runs `_C::int8_scaled_mm_with_quant` itself."""
        return "int8_vnni", (self._weight, self._scale), self._bias

    def rows(self, x: Tensor) -> Tensor:
        out: Tensor = self._run(x, self._weight, self._scale, self._bias, self._dtype, True)
        return out


class Int4VnniLinear(Rows):
    __slots__ = ("_bias", "_run", "_scale", "_weight", "_zero")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight, self._zero, self._scale = tensors["weight"], tensors["zero"], tensors["scale"]
        self._run = _op("int4_scaled_mm_cpu")
        self._bias = bias_in(bias, torch.float32)
        self.n, self.k = packing.w4_vnni_shape(self._weight)
        self.nbytes = nbytes_of(self._weight, self._zero, self._scale, self._bias)

    @property
    def native(self) -> Native:
        """Arguments for a caller that runs `_C::int4_scaled_mm_cpu` itself."""
        return "int4_vnni", (self._weight, self._zero, self._scale), self._bias

    def rows(self, x: Tensor) -> Tensor:
        out: Tensor = self._run(x, self._weight, self._zero, self._scale, self._bias)
        return out


class Int8OnednnLinear(Rows):
    """A oneDNN matmul, whose reordered weight lives outside torch's tensors."""

    __slots__ = ("_bias", "_handler", "_quantize", "_release", "_run", "_scale")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        weight, scale = tensors["weight"], tensors["scale"]
        self.n, self.k = weight.shape
        self._release = _op("release_dnnl_matmul_handler")
        self._quantize, self._run = _op("dynamic_scaled_int8_quant"), _op("onednn_scaled_mm")
        # Arguments: dynamic activation scales, no activation zero point, primitive cache entries.
        create = _op("create_onednn_scaled_mm_handler")
        pointer = create(weight.t(), scale.view(-1, 1), dtype, True, False, 32)
        self._handler = torch.tensor(pointer, dtype=torch.int64)
        self._scale = scale  # the handler does not copy the scales
        self._bias = bias_in(bias, dtype)
        self.nbytes = weight.nbytes + nbytes_of(scale, self._bias)

    def rows(self, x: Tensor) -> Tensor:
        quantized = torch.empty_like(x, dtype=torch.int8)
        scales = torch.empty((x.shape[0], 1), dtype=torch.float32)
        self._quantize(quantized, x, scales, None)
        out = torch.empty((x.shape[0], self.n), dtype=x.dtype)
        self._run(out, quantized, scales, None, None, self._bias, self._handler)
        return out

    def __del__(self) -> None:
        if hasattr(self, "_handler"):  # absent when the constructor failed
            self._release(self._handler.item())


class Int4WeightOnlyLinear(Rows):
    __slots__ = ("_bias", "_run", "_scale", "_weight", "_zero")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight, self._zero, self._scale = tensors["weight"], tensors["zero"], tensors["scale"]
        self._run = _op("cpu_gemm_wna16")
        self._bias = bias_in(bias, dtype)
        self.n, self.k = self._scale.shape[1], self._weight.shape[1] // 2
        self.nbytes = nbytes_of(self._weight, self._zero, self._scale, self._bias)

    def rows(self, x: Tensor) -> Tensor:
        out = torch.empty((x.shape[0], self.n), dtype=x.dtype)
        self._run(x, self._weight, out, self._scale, self._zero, self._bias, 8, "vec")
        return out


class Int8WeightOnlyLinear(Rows):
    __slots__ = ("_bias", "_scale", "_weight")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight, self._scale = tensors["weight"], tensors["scale"].to(dtype)
        self._bias = bias_in(bias, dtype)
        self.n, self.k = self._weight.shape
        self.nbytes = nbytes_of(self._weight, self._scale, self._bias)

    def rows(self, x: Tensor) -> Tensor:
        out = torch.ops.aten._weight_int8pack_mm.default(x, self._weight, self._scale)
        return out if self._bias is None else out.add_(self._bias)


class Int4TritonLinear(Rows):
    __slots__ = ("_bias", "_run", "_scale", "_weight", "_zero")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        from quant_layers.kernels.triton_w4a16 import w4a16_matmul  # Triton only where it is used

        self._run = w4a16_matmul
        self._weight, self._zero, self._scale = tensors["weight"], tensors["zero"], tensors["scale"]
        self._bias = bias_in(bias, dtype)
        self.n, self.k = self._weight.shape[1], self._weight.shape[0] * 8
        self.nbytes = nbytes_of(self._weight, self._zero, self._scale, self._bias)

    def rows(self, x: Tensor) -> Tensor:
        return self._run(x, self._weight, self._scale, self._zero, self._bias)
