"""4-bit weights with zero points on Hopper GPUs, through the Machete kernel that vLLM brings. Never run here yet.

Only vLLM's operator knows the layout, and lays weights out on the GPU: what it gives takes the bytes of packed 4 bits,
belongs to the vLLM that made it, and is made anew at every start. To read it back, the operator is asked where it puts
each weight: it moves 4-bit values and changes none, so numbered weights tell.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quant_layers.errors import KernelError
from quant_layers.formats.canonical import Quant, QuantW4
from quant_layers.formats.packing import _from_words, _to_words
from quant_layers.kernels.base import KernelBase
from quant_layers.kernels.cpu_linears import UINT4_ID, Rows, _op, bias_in, nbytes_of
from quant_layers.kernels.registry import register

_BLOCK_N, _BLOCK_K = 128, 64  # of a block that is laid out as one
_PER_WORD = 8
_PIECE = 1 << 22  # weights that become words at a time


class MacheteLinear(Rows):
    __slots__ = ("_bias", "_group_size", "_run", "_scale", "_weight", "_zero")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        self._run = _op("machete_mm")
        self._weight, self._scale, self._zero = tensors["weight"], tensors["scale"], tensors["zero"]
        self._bias = bias_in(bias, dtype)
        self.n, self.k = self._weight.shape[1], self._weight.shape[0] * _PER_WORD
        self._group_size = self.k // len(self._scale)
        self.nbytes = nbytes_of(self._weight, self._scale, self._zero, self._bias)

    def rows(self, x: Tensor) -> Tensor:
        # Arguments by place, as vLLM calls it (vllm/_custom_ops.py, machete_mm): output like `x`, its own schedule.
        out: Tensor = self._run(
            x, self._weight, UINT4_ID, None, self._scale, self._zero, self._group_size, None, None, None
        )
        return out if self._bias is None else out.add_(self._bias)


class W4A16Machete(KernelBase):
    """A kernel with groups of 64 or 128; where a weight or its groups do not fit, Marlin is next.

    It computes q * scale + zero in the activations' dtype, and zero = -scale * zero point is rounded to it when packed.
    In bf16 each of these roundings may take a seventeenth of a step, which `reference` does not tell.
    """

    name, canonical = "w4a16_machete", QuantW4
    linear = MacheteLinear
    quantizes_activations = False
    fast_on = ("cuda",)
    packs_on = "cuda"
    proof_shapes = ((896, 640), (640, 1536), (128, 256))
    _ops = ("machete_prepack_B", "machete_mm")
    _groups = (64, 128)
    _multiples = (_BLOCK_N, _BLOCK_K)

    def _no_device(self) -> str:
        # Its instructions are those of sm_90 alone: later GPUs have others.
        if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
            return ""
        return "needs an NVIDIA GPU of sm_90"

    def lay_out(self, quant: QuantW4) -> dict[str, Tensor]:
        """Pack with one byte a weight on the GPU beside what is given, and return the result where `quant` lies.

        Returns:
            weight: int32 [K / 8, N], in an order of its own. scale, zero: [G, N], the activations' dtype.
        """
        scale = quant.scale.to(self.dtype)
        zero = -scale * quant.zero.to(self.dtype)
        weight = self._prepack(quant.q).to(quant.q.device)
        return {"weight": weight, "scale": _by_group(scale), "zero": _by_group(zero)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        weight, scale, zero = tensors["weight"], tensors["scale"], tensors["zero"]
        k, n = weight.shape[0] * _PER_WORD, weight.shape[1]
        q = torch.empty(n * k, dtype=torch.uint8, device=weight.device)
        q[self._places(n, k, weight).to(weight.device)] = _flat(weight)
        # Its rounding is far less than half a step: what was multiplied comes out.
        points = (zero.float() / -scale.float()).round_().to(torch.uint8)
        return QuantW4(q.view(n, k), scale.t().contiguous(), points.t().contiguous())

    def _prepack(self, q: Tensor) -> Tensor:
        """Turn uint8 [N, K] into int32 [K / 8, N] on the GPU."""
        n, k = q.shape
        words = torch.empty((n, k // _PER_WORD), dtype=torch.int32, device=self._device_for(q))
        rows = max(1, _PIECE // k)
        for start in range(0, n, rows):  # in pieces, so that nothing else of the weight's size is made
            words[start : start + rows] = _to_words(q[start : start + rows].to(words.device))
        # Column by column, as the operator wants it.
        packed: Tensor = _op("machete_prepack_B")(words.t(), self.dtype, UINT4_ID, self.dtype)
        return packed

    def _device_for(self, tensor: Tensor) -> torch.device:
        here = tensor.device
        return here if self.packs_on in ("", here.type) else torch.device(self.packs_on)

    def _places(self, n: int, k: int, weight: Tensor) -> Tensor:
        """Find which weight of a row-major [N, K] the operator puts where: int64 [N * K]. Takes some 30 bytes a weight.

        Raises:
            KernelError: some weight comes out twice, or not at all.
        """
        number = torch.arange(n * k, device=self._device_for(weight)).view(n, k)
        places = torch.zeros_like(number).flatten()
        for bit in range(0, (n * k - 1).bit_length(), 4):
            places |= _flat(self._prepack((number >> bit & 15).to(torch.uint8))).long() << bit
        known = int(places.max()) < n * k
        if not known or not bool(torch.zeros_like(places, dtype=torch.bool).index_fill_(0, places, True).all()):
            raise KernelError(
                f"{self.name}: machete_prepack_B does more to a weight [N={n}, K={k}] than to move its values, so what "
                "it packed cannot be read back; name another kernel for w4 under `kernels`"
            )
        return places


def _by_group(per_row: Tensor) -> Tensor:
    """Turn [N, G] into [G, N]. The operator compares strides, also where there is one group and they mean nothing."""
    return per_row.t().clone(memory_format=torch.contiguous_format)


def _flat(words: Tensor) -> Tensor:
    """Return all 4-bit values in the order of memory: uint8."""
    return _from_words(words.reshape(1, -1)).flatten()


register(W4A16Machete)
