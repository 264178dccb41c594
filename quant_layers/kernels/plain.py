"""Kernels in plain torch, for CPUs where nothing compiled runs: any dtype, any shape. They save memory, not time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from quant_layers.formats.canonical import Quant, QuantW4, QuantW8
from quant_layers.kernels.base import KernelBase
from quant_layers.kernels.cpu_linears import LinearImpl, Rows, bias_in, nbytes_of

_WIDEN_AT_ONCE = 1 << 18  # weights; widened to fp32 they lie in a core's cache until they are multiplied


class _Plain(KernelBase):
    quantizes_activations = False
    runs_on = slow_on = ("cpu",)
    _dtypes = (torch.float32, torch.bfloat16, torch.float16)
    _multiples = (1, 1)

    @property
    def _scale_dtype(self) -> torch.dtype:
        return torch.float32


class W8Plain(_Plain):
    """A kernel of 8-bit weights, widened a piece at a time and multiplied in fp32."""

    name, canonical = "w8_plain", QuantW8

    def lay_out(self, quant: QuantW8) -> dict[str, Tensor]:
        return {"weight": quant.q, "scale": quant.scale.float()}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return QuantW8(tensors["weight"], tensors["scale"])

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        weight, scale = tensors["weight"], tensors["scale"]

        def widen(start: int, end: int) -> Tensor:
            return weight[start:end].float().mul_(scale[start:end, None])

        return PlainLinear(*weight.shape, widen, bias, nbytes_of(weight, scale))


class W4Plain(_Plain):
    """A kernel of 4-bit weights, two to a byte."""

    name, canonical = "w4_plain", QuantW4

    def lay_out(self, quant: QuantW4) -> dict[str, Tensor]:
        weight = quant.q[:, ::2] | (quant.q[:, 1::2] << 4)
        return {"weight": weight, "zero": quant.zero, "scale": quant.scale.float()}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        packed = tensors["weight"]
        q = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
        return QuantW4(q, tensors["scale"], tensors["zero"])

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        packed = tensors["weight"]

        def widen(start: int, end: int) -> Tensor:
            return self.unpack({name: part[start:end] for name, part in tensors.items()}).dequantize()

        return PlainLinear(packed.shape[0], 2 * packed.shape[1], widen, bias, nbytes_of(*tensors.values()))


class PlainLinear(Rows):
    """A linear in fp32 over what `widen(start, end)` says rows of the weight mean: fp32 [end - start, K].

    In the activations' own dtype it would be slower on a CPU without instructions for it, and sums of fp16 overflow.
    """

    __slots__ = ("_bias", "_widen")

    def __init__(
        self, n: int, k: int, widen: Callable[[int, int], Tensor], bias: Tensor | None, weight_bytes: int
    ) -> None:
        self.n, self.k, self._widen = n, k, widen
        self._bias = bias_in(bias, torch.float32)
        self.nbytes = weight_bytes + nbytes_of(self._bias)

    def rows(self, x: Tensor) -> Tensor:
        wide = x.float()
        out = wide.new_empty((x.shape[0], self.n))
        rows = max(1, _WIDEN_AT_ONCE // self.k)
        for start in range(0, self.n, rows):
            end = min(start + rows, self.n)
            out[:, start:end] = linear(wide, self._widen(start, end))
        if self._bias is not None:
            out += self._bias
        return out.to(x.dtype)
