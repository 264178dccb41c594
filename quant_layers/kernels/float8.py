"""fp8 x fp8 on NVIDIA GPUs through vLLM's own operators: one kernel rounds the tokens, one multiplies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quant_layers.formats.float8 import F8A8
from quant_layers.kernels.cpu_linears import Rows, _op, bias_in, nbytes_of
from quant_layers.kernels.registry import register


class F8CutlassLinear(Rows):
    __slots__ = ("_bias", "_multiply", "_round", "_scale", "_weight")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        weight, scale = tensors["weight"], tensors["scale"]
        self._multiply, self._round = _op("cutlass_scaled_mm"), _op("dynamic_per_token_scaled_fp8_quant")
        self._weight, self._scale = weight.t(), scale[:, None]  # column by column, as the operator wants it
        self._bias = bias_in(bias, dtype)
        self.n, self.k = weight.shape
        self.nbytes = nbytes_of(weight, scale, self._bias)

    def rows(self, x: Tensor) -> Tensor:
        q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        scales = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
        self._round(q, x, scales, None)
        out = torch.empty((x.shape[0], self.n), dtype=x.dtype, device=x.device)
        self._multiply(out, q, self._weight, scales, self._scale, self._bias)
        return out


class F8A8Cutlass(F8A8):
    """A kernel of fp8 x fp8 in which six small kernels for the tokens' rounding become one. Never run here yet."""

    name = "fp8_cutlass"
    linear = F8CutlassLinear
    slow_on = ()
    fast_on = ("cuda",)
    _dtypes = (torch.bfloat16, torch.float16)
    _ops = ("cutlass_scaled_mm", "dynamic_per_token_scaled_fp8_quant")

    def _no_device(self) -> str:
        if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
            return ""
        return "needs an NVIDIA GPU that multiplies fp8 (sm_89 or later)"


register(F8A8Cutlass)
