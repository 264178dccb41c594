"""The format `fp8`: float8_e4m3fn with one scale per output channel. Canonical form, kernels and linears, all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_layers.formats.canonical import Quant, finite_matrix, round_up, usable_scale
from quant_layers.kernels.base import KernelBase
from quant_layers.kernels.cpu_linears import Rows, bias_in, nbytes_of
from quant_layers.kernels.registry import register

_MAX = 448.0
_MIN_NORMAL = 2.0**-6
_HALF_ULP_EXPONENT = -5.0  # of the mantissa that frexp gives, in [0.5, 1): four significant bits
_WIDEN_AT_ONCE = 1 << 18  # weights; widened they lie in a core's cache until they are multiplied


@dataclass(frozen=True, slots=True)
class QuantF8(Quant):
    """A float8_e4m3fn weight: weight = q * scale. Fine near zero, coarse at the ends."""

    q: Tensor  # float8_e4m3fn [N, K]
    scale: Tensor  # fp32 [N]

    format = "fp8"
    bits = 8
    coarsest_levels = 28  # from -448 to 448 in steps of 32
    per_row = True
    int8_activations = False

    @classmethod
    def of(cls, weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> QuantF8:
        values = finite_matrix(weight)
        scale = usable_scale(round_up(values.abs().amax(dim=1) / _MAX, scale_dtype))
        return cls(_rounded(values, scale.float()[:, None]), scale)

    @classmethod
    def packed_bytes(cls, n: int, k: int) -> int:
        return n * k + 4 * n

    def dequantize(self) -> Tensor:
        return self.q.float() * self.scale.float()[:, None]


def _rounded(values: Tensor, scale: Tensor) -> Tensor:
    """Round `values` in steps of `scale`. Clamped first: what does not fit would become NaN."""
    return (values / scale).clamp_(-_MAX, _MAX).to(torch.float8_e4m3fn)


def _half_step(q: Tensor) -> Tensor:
    """Return half the distance of each value from its neighbours: fp32."""
    exponent = torch.frexp(q.float().abs().clamp_min(_MIN_NORMAL)).exponent
    return torch.exp2(exponent + _HALF_ULP_EXPONENT)


def _round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of `x` [M, K] in fp8, and their scales, fp32 [M, 1]."""
    scale = usable_scale(x.abs().amax(dim=1, keepdim=True).float() / _MAX)
    return _rounded(x.float(), scale), scale


class F8ScaledLinear(Rows):
    __slots__ = ("_bias", "_scale", "_weight")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        weight, scale = tensors["weight"], tensors["scale"]
        self._weight, self._scale = weight.t(), scale[None, :]  # column by column, as the operator wants it
        self._bias = bias_in(bias, dtype)
        self.n, self.k = weight.shape
        self.nbytes = nbytes_of(weight, scale, self._bias)

    def rows(self, x: Tensor) -> Tensor:
        q, scale = _round_tokens(x)
        return torch._scaled_mm(q, self._weight, scale, self._scale, bias=self._bias, out_dtype=x.dtype)


class F8WeightOnlyLinear(Rows):
    __slots__ = ("_bias", "_rows", "_scale", "_values", "_weight")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        weight, scale = tensors["weight"], tensors["scale"]
        self._weight, self._scale = weight, scale[:, None]
        self._bias = bias_in(bias, dtype)
        self.n, self.k = weight.shape
        self._rows = max(1, _WIDEN_AT_ONCE // self.k)
        # torch casts fp8 value by value on CPU: looking them up in a table of all 256 is five times as fast.
        codes = torch.arange(256, dtype=torch.uint8, device=weight.device)
        self._values = codes.view(torch.float8_e4m3fn).to(dtype)
        self.nbytes = nbytes_of(weight, scale, self._bias)

    def rows(self, x: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], self.n)
        for start in range(0, self.n, self._rows):
            rows = slice(start, start + self._rows)
            out[:, rows] = x @ self._widened(rows).t()
        return out if self._bias is None else out.add_(self._bias)

    def _widened(self, rows: slice) -> Tensor:
        codes = self._weight[rows].view(torch.uint8).int()
        # Scaled before it is multiplied: in fp16, sums of values up to 448 would overflow.
        return self._values.index_select(0, codes.flatten()).view(codes.shape).mul_(self._scale[rows])


class _F8Kernel(KernelBase):
    canonical = QuantF8
    _scale_dtype = torch.float32

    def lay_out(self, quant: QuantF8) -> dict[str, Tensor]:
        return {"weight": quant.q, "scale": quant.scale.float()}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return QuantF8(tensors["weight"], tensors["scale"])


class F8A8(_F8Kernel):
    """A kernel of fp8 x fp8 in torch, activations rounded by token: for GPUs that multiply fp8 (sm_89 on).

    torch 2.13 computes it on CPU too, rightly, but many times slower than bf16: there only for who names it.
    """

    name = "fp8_torch"
    linear = F8ScaledLinear
    slow_on = ("cpu",)
    _dtypes = (torch.bfloat16,)  # on GPUs, all that scales by row and column allow
    _multiples = (16, 16)

    def unavailable(self) -> str:
        return super().unavailable() or ("" if hasattr(torch, "_scaled_mm") else "this torch has no _scaled_mm")

    def activation_half_step(self, x: Tensor) -> Tensor:
        q, scale = _round_tokens(x)
        return _half_step(q).double() * scale.double()


class F8A16(_F8Kernel):
    """A kernel that widens fp8 weights block by block in every call: half the memory, nothing of fp8's speed.

    On CPU a linear of a decode step takes some ten times as long as in bf16, so no ladder has this format by itself.
    """

    name = "fp8a16"
    linear = F8WeightOnlyLinear
    quantizes_activations = False
    _multiples = (1, 1)


for _kernel in (F8A8, F8A16):
    register(_kernel)
