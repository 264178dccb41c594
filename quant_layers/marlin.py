"""Marlin's weight layout for 4 bits with zero points, packed and unpacked by torch alone, and the kernel that reads it.

The layout is that of vLLM's `gptq_marlin_repack`, `marlin_permute_scales` and `marlin_zero_points`
(vllm/model_executor/layers/quantization/utils/marlin_utils.py): tiles of 16 x 64 weights in the order in which a warp's
lanes feed them to the matrix units. Packed on any device, so that a server packs once and its GPU never does.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from .errors import KernelError
from .kernels import KernelBase
from .linears import LinearImpl, Rows, _op, nbytes_of
from .neutral import Quant, QuantW4
from .packing import _from_words, _to_words
from .registry import register

_TILE = 16
_COLUMNS = 64  # of a chunk that one permutation covers
_MIN_K = 128
_GROUPS = (32, 64, 128)
_LOW_FIRST = (0, 2, 4, 6, 1, 3, 5, 7)  # nibbles of a word: the kernel takes the even ones out with one mask
# vLLM's id of an unsigned 4-bit type without bias (vllm/scalar_type.py): mantissa from bit 8 on, NaNs from 50 on.
UINT4_ID = (4 << 8) | (1 << 50)


@cache
def _weight_order() -> Tensor:
    """int64 [1024]: which weight of a chunk of 16 x 64, tile by tile, stands where."""
    order = []
    for lane in range(32):
        column, row = lane // 4, 2 * (lane % 4)
        places = [
            _TILE * (row + step) + column + 8 * half for half in (0, 1) for step in (0, 1, 8, 9)
        ]  # what one lane multiplies, of one tile
        for tile in range(_COLUMNS // _TILE):
            order += [tile * _TILE * _TILE + place for place in places]
    words = torch.tensor(order).view(-1, 8)
    return words[:, list(_LOW_FIRST)].reshape(-1)


@cache
def _zero_order() -> Tensor:
    """int64 [64]: the same for a row of zero points."""
    return torch.arange(64).view(8, 8).t().reshape(-1)


def _scale_order(num_groups: int) -> Tensor:
    """int64 [64] or [32]: for a row of scales. A single group's apply to sums, which lie otherwise in the lanes."""
    if num_groups > 1:
        return _zero_order()
    return torch.tensor([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])


def _inverse(order: Tensor) -> Tensor:
    return torch.argsort(order)


def pack_w4_marlin(quant: QuantW4) -> dict[str, Tensor]:
    """
    Returns:
        weight: int32 [K / 16, 2 N]. zero: int32 [G, N / 8]. scale: [G, N], dtype as quantized.
    """
    n, k = quant.q.shape
    device = quant.q.device
    tiles = quant.q.t().reshape(k // _TILE, _TILE, n // _TILE, _TILE).permute(0, 2, 1, 3)
    chunks = tiles.reshape(-1, _TILE * _COLUMNS)[:, _weight_order().to(device)]
    zero = quant.zero.t().reshape(-1, 64)[:, _zero_order().to(device)].reshape(-1, 8)[:, list(_LOW_FIRST)]
    order = _scale_order(quant.scale.shape[1]).to(device)
    scale = quant.scale.t().reshape(-1, len(order))[:, order]
    return {
        "weight": _to_words(chunks.reshape(k // _TILE, n * _TILE)),
        "zero": _to_words(zero.reshape(-1, n)),
        "scale": scale.reshape(-1, n).contiguous(),
    }


def unpack_w4_marlin(packed: Mapping[str, Tensor]) -> QuantW4:
    """Inverse of `pack_w4_marlin`."""
    scale, weight = packed["scale"], packed["weight"]
    n, k = scale.shape[1], weight.shape[0] * _TILE
    device = weight.device
    chunks = _from_words(weight).reshape(-1, _TILE * _COLUMNS)[:, _inverse(_weight_order()).to(device)]
    q = chunks.view(k // _TILE, n // _TILE, _TILE, _TILE).permute(0, 2, 1, 3).reshape(k, n)
    back = _inverse(_zero_order()).to(device)
    low = _inverse(torch.tensor(_LOW_FIRST)).to(device)
    zero = _from_words(packed["zero"]).reshape(-1, 8)[:, low].reshape(-1, 64)[:, back].reshape(-1, n)
    order = _inverse(_scale_order(len(scale))).to(device)
    scale = scale.reshape(-1, len(order))[:, order].reshape(-1, n)
    return QuantW4(q.t().contiguous(), scale.t().contiguous(), zero.t().contiguous())


class W4A16Marlin(KernelBase):
    """4-bit weights with zero points on NVIDIA GPUs, through the Marlin kernel that vLLM brings. Never run here yet."""

    name, neutral = "w4a16_marlin", QuantW4
    quantizes_activations = False
    fast_on = ("cuda",)
    _ops = ("marlin_gemm",)
    _multiple = _COLUMNS
    proof_shapes = ((960, 640), (576, 1536), (64, 256))

    def _no_device(self) -> str:
        return "" if torch.cuda.is_available() else "needs an NVIDIA GPU"

    def check_shape(self, n: int, k: int) -> None:
        super().check_shape(n, k)
        if k % _MIN_K:
            raise KernelError(
                f"{self.name}: K={k} of a weight [N={n}, K={k}] is not a multiple of {_MIN_K}; leave this linear at "
                "base, or choose another tensor-parallel size"
            )

    def pack_quant(self, quant: Quant) -> dict[str, Tensor]:
        self._admit_quant(quant)
        assert isinstance(quant, QuantW4)
        if quant.group_size not in _GROUPS:
            raise KernelError(
                f"{self.name}: group size {quant.group_size}, it takes {_GROUPS}; make the checkpoint with one of them"
            )
        return pack_w4_marlin(QuantW4(quant.q, quant.scale.to(self.dtype), quant.zero))

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return Int4MarlinLinear(tensors, None if bias is None else bias.to(self.dtype))

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return unpack_w4_marlin(tensors)


@cache
def _workspace(device: torch.device) -> Tensor:
    """Locks of the kernel, four a multiprocessor at most, zero between calls: all linears of a device share them.

    Made with the first linear, so before vLLM locks its own workspaces and captures graphs.
    """
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return torch.zeros(4 * count, dtype=torch.int32, device=device)


class Int4MarlinLinear(Rows):
    __slots__ = ("_bias", "_locks", "_run", "_scale", "_weight", "_zero")

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        self._run = _op("marlin_gemm")
        self._weight, self._zero, self._scale = tensors["weight"], tensors["zero"], tensors["scale"]
        self._bias = bias
        self._locks = _workspace(self._weight.device)
        self.n, self.k = self._scale.shape[1], self._weight.shape[0] * _TILE
        self.nbytes = nbytes_of(self._weight, self._zero, self._scale, self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or not x.is_contiguous() or not x.numel():
            return self._reshaped(x)
        # Arguments by place, as vLLM calls it (vllm/_custom_ops.py, marlin_gemm): no atomic adds, sums in fp32.
        out: Tensor = self._run(
            x, None, self._weight, None, self._scale, None, None, self._zero, self._locks, UINT4_ID,
            x.shape[0], self.n, self.k, False, True, False,
        )  # fmt: skip
        return out if self._bias is None else out.add_(self._bias)


register(W4A16Marlin)
