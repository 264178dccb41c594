"""Marlin's weight layouts for 4 and 8 bits, packed and unpacked by torch alone, and the kernels that read them.

The layouts are those of vLLM's `gptq_marlin_repack`, `marlin_permute_scales` and `marlin_zero_points`
(vllm/model_executor/layers/quantization/utils/marlin_utils.py): tiles of 16 x 64 weights in the order in which a warp's
lanes feed them to the matrix units. Packed on any device, so that a server packs once and its GPU never does.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from quant_layers.formats.canonical import Quant, QuantW4, QuantW8
from quant_layers.formats.packing import _from_words, _to_words
from quant_layers.kernels.base import KernelBase
from quant_layers.kernels.cpu_linears import UINT4_ID, UINT8B128_ID, LinearImpl, Rows, _op, bias_in, nbytes_of
from quant_layers.kernels.registry import register

_TILE = 16
_COLUMNS = 64  # of a chunk that one permutation covers
_MIN_K = 128
_GROUPS = (32, 64, 128)
# Values of a word, by bits: the kernel takes those at even places out with one mask.
_LOW_FIRST = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
_SIGN = 0x80  # int8 with its sign bit flipped is the value plus 128


@cache
def _weight_order(bits: int) -> Tensor:
    """Return which weight of a chunk of 16 x 64, tile by tile, stands where: int64 [1024]."""
    order = []
    for lane in range(32):
        column, row = lane // 4, 2 * (lane % 4)
        places = [
            _TILE * (row + step) + column + 8 * half for half in (0, 1) for step in (0, 1, 8, 9)
        ]  # what one lane multiplies, of one tile
        for tile in range(_COLUMNS // _TILE):
            order += [tile * _TILE * _TILE + place for place in places]
    low_first = list(_LOW_FIRST[bits])
    return torch.tensor(order).view(-1, len(low_first))[:, low_first].reshape(-1)


@cache
def _zero_order() -> Tensor:
    """Return which zero point of a row stands where: int64 [64]."""
    return torch.arange(64).view(8, 8).t().reshape(-1)


def _scale_order(num_groups: int) -> Tensor:
    """Return which scale of a row stands where: int64 [64] or [32]. A single group's sums lie otherwise in lanes."""
    if num_groups > 1:
        return _zero_order()
    return torch.tensor([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])


def _inverse(order: Tensor) -> Tensor:
    return torch.argsort(order)


def _in_chunks(q: Tensor, bits: int) -> Tensor:
    """Turn uint8 [N, K] into [K / 16, 16 N], tile by tile in the order of the lanes."""
    n, k = q.shape
    tiles = q.t().reshape(k // _TILE, _TILE, n // _TILE, _TILE).permute(0, 2, 1, 3)
    chunks = tiles.reshape(-1, _TILE * _COLUMNS)[:, _weight_order(bits).to(q.device)]
    return chunks.reshape(k // _TILE, n * _TILE)


def _from_chunks(chunks: Tensor, bits: int) -> Tensor:
    """Invert `_in_chunks`."""
    n, k = chunks.shape[1] // _TILE, chunks.shape[0] * _TILE
    tiles = chunks.reshape(-1, _TILE * _COLUMNS)[:, _inverse(_weight_order(bits)).to(chunks.device)]
    q = tiles.view(k // _TILE, n // _TILE, _TILE, _TILE).permute(0, 2, 1, 3).reshape(k, n)
    return q.t().contiguous()


def _lay_scale(scale: Tensor) -> Tensor:
    """Turn [N, G] into [G, N] in the order of the lanes."""
    order = _scale_order(scale.shape[1]).to(scale.device)
    return scale.t().reshape(-1, len(order))[:, order].reshape(-1, len(scale)).contiguous()


def _read_scale(scale: Tensor) -> Tensor:
    """Invert `_lay_scale`."""
    order = _inverse(_scale_order(len(scale))).to(scale.device)
    return scale.reshape(-1, len(order))[:, order].reshape(scale.shape).t().contiguous()


def pack_w4_marlin(quant: QuantW4) -> dict[str, Tensor]:
    """Lay out 4-bit weights as Marlin reads them.

    Returns:
        weight: int32 [K / 16, 2 N]. zero: int32 [G, N / 8]. scale: [G, N], dtype as quantized.
    """
    n = len(quant.q)
    zero = quant.zero.t().reshape(-1, 64)[:, _zero_order().to(quant.q.device)].reshape(-1, 8)[:, list(_LOW_FIRST[4])]
    return {
        "weight": _to_words(_in_chunks(quant.q, 4)),
        "zero": _to_words(zero.reshape(-1, n)),
        "scale": _lay_scale(quant.scale),
    }


def unpack_w4_marlin(packed: Mapping[str, Tensor]) -> QuantW4:
    """Invert `pack_w4_marlin`."""
    n, device = packed["scale"].shape[1], packed["zero"].device
    low, back = _inverse(torch.tensor(_LOW_FIRST[4])).to(device), _inverse(_zero_order()).to(device)
    zero = _from_words(packed["zero"]).reshape(-1, 8)[:, low].reshape(-1, 64)[:, back].reshape(-1, n)
    q = _from_chunks(_from_words(packed["weight"]), 4)
    return QuantW4(q, _read_scale(packed["scale"]), zero.t().contiguous())


def pack_w8_marlin(quant: QuantW8) -> dict[str, Tensor]:
    """Lay out 8-bit weights as Marlin reads them.

    Returns:
        weight: int32 [K / 16, 4 N], values plus 128. scale: [1, N], dtype as quantized.
    """
    return {
        "weight": _in_chunks(quant.q.view(torch.uint8), 8).bitwise_xor_(_SIGN).view(torch.int32),
        "scale": _lay_scale(quant.scale[:, None]),
    }


def unpack_w8_marlin(packed: Mapping[str, Tensor]) -> QuantW8:
    """Invert `pack_w8_marlin`."""
    biased = _from_chunks(packed["weight"].contiguous().view(torch.uint8), 8)
    return QuantW8((biased ^ _SIGN).view(torch.int8), _read_scale(packed["scale"])[:, 0].contiguous())


class _Marlin(KernelBase):
    quantizes_activations = False
    fast_on = ("cuda",)
    _ops = ("marlin_gemm",)
    _multiples = (_COLUMNS, _MIN_K)
    canonical: ClassVar[type[Quant]] = QuantW4
    proof_shapes = ((960, 640), (576, 1536), (64, 256))

    def _no_device(self) -> str:
        if not torch.cuda.is_available():
            return "needs an NVIDIA GPU"
        needed = (7, 5) if self.dtype == torch.float16 else (8, 0)
        if torch.cuda.get_device_capability() < needed:
            return f"needs an NVIDIA GPU of sm_{needed[0]}{needed[1]} or later for these activations"
        return ""


class W4A16Marlin(_Marlin):
    """A kernel of 4-bit weights with zero points on NVIDIA GPUs, Marlin's as vLLM brings it. Never run here yet."""

    name, canonical = "w4a16_marlin", QuantW4
    _groups = _GROUPS

    def lay_out(self, quant: QuantW4) -> dict[str, Tensor]:
        return pack_w4_marlin(QuantW4(quant.q, quant.scale.to(self.dtype), quant.zero))

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return MarlinLinear(tensors, UINT4_ID, bias_in(bias, self.dtype))

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return unpack_w4_marlin(tensors)


class W8A16Marlin(_Marlin):
    """A kernel of 8-bit weights, one scale a row, Marlin's too: for GPUs that do not multiply fp8 (before sm_89).

    Never run here yet. Half the bytes of bf16, and activations lose nothing.
    """

    name, canonical = "w8a16_marlin", QuantW8

    def lay_out(self, quant: QuantW8) -> dict[str, Tensor]:
        return pack_w8_marlin(QuantW8(quant.q, quant.scale.to(self.dtype)))

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return MarlinLinear(tensors, UINT8B128_ID, bias_in(bias, self.dtype))

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return unpack_w8_marlin(tensors)


@cache
def _workspace(device: torch.device) -> Tensor:
    """Return the kernel's locks, four a multiprocessor at most, zero between calls: all linears of a device share them.

    Made with the first linear, so before vLLM locks its own workspaces and captures graphs.
    """
    # Only a stand-in for the operator runs on another device, and locks nothing.
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return torch.zeros(4 * count, dtype=torch.int32, device=device)


class MarlinLinear(Rows):
    """A linear with zero points where `tensors` has them."""

    __slots__ = ("_bias", "_locks", "_run", "_scale", "_type", "_weight", "_zero")

    def __init__(self, tensors: Mapping[str, Tensor], type_id: int, bias: Tensor | None) -> None:
        self._run = _op("marlin_gemm")
        self._weight, self._zero, self._scale = tensors["weight"], tensors.get("zero"), tensors["scale"]
        self._type, self._bias = type_id, bias
        self._locks = _workspace(self._weight.device)
        self.n, self.k = self._scale.shape[1], self._weight.shape[0] * _TILE
        self.nbytes = nbytes_of(self._weight, self._zero, self._scale, self._bias)

    def rows(self, x: Tensor) -> Tensor:
        # Arguments by place, as vLLM calls it (vllm/_custom_ops.py, marlin_gemm): no atomic adds, sums in fp32.
        out: Tensor = self._run(
            x, None, self._weight, None, self._scale, None, None, self._zero, self._locks, self._type,
            x.shape[0], self.n, self.k, False, True, False,
        )  # fmt: skip
        return out if self._bias is None else out.add_(self._bias)


for _kernel in (W4A16Marlin, W8A16Marlin):
    register(_kernel)
