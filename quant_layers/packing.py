"""Round-to-nearest quantizers, their neutral form, and the byte layouts of the CPU kernels.

The neutral form is plain integers: `q` [N, K] with a scale per output channel (8 bits) or per group of
input channels (4 bits). Everything here is pure torch, so that what a kernel computes can be proven
against arithmetic that does not share a line with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import KernelError

GROUP_SIZES = (64, 32)  # tried in this order; 128 divides too few hidden sizes to be worth a layout
IMPORTED_GROUP_SIZES = (128, *GROUP_SIZES)  # what others quantized may come in
TILE_N = 32  # output channels in one block of the VNNI kernels
_W8_MAX = 127  # -128 is left out: the grid stays symmetric
_W4_MAX = 15
_W4_SYM_ZERO = 8
_COMP_BYTES = 4  # one int32 of compensation per output channel and block


@dataclass(frozen=True, slots=True)
class QuantW8:
    """Symmetric, one scale per output channel: weight = q * scale."""

    q: Tensor  # int8 [N, K], -127..127
    scale: Tensor  # fp32 [N]


@dataclass(frozen=True, slots=True)
class QuantW4:
    """Grouped along K, with zero points: weight = (q - zero) * scale."""

    q: Tensor  # uint8 [N, K], 0..15
    scale: Tensor  # [N, K / group_size]
    zero: Tensor  # uint8 [N, K / group_size], 0..15

    @property
    def group_size(self) -> int:
        """Input channels that share one scale."""
        return self.q.shape[1] // self.scale.shape[1]


def choose_group_size(k: int) -> int:
    """The largest supported group size that divides `k`.

    Raises:
        KernelError: none divides it.
    """
    for size in GROUP_SIZES:
        if k % size == 0:
            return size
    raise KernelError(
        f"input size K={k} is divisible by none of the group sizes {GROUP_SIZES}; "
        "keep this linear out of w4 (use w8 or base), or choose a tensor-parallel size that leaves a "
        "multiple of 32"
    )


def quantize_w8(weight: Tensor) -> QuantW8:
    """Round `weight` [N, K] to the nearest of 255 levels per output channel."""
    values = _checked(weight)
    scale = _usable(values.abs().amax(dim=1) / _W8_MAX)
    q = (values / scale[:, None]).round_().clamp_(-_W8_MAX, _W8_MAX).to(torch.int8)
    return QuantW8(q, scale)


def quantize_w4(
    weight: Tensor, group_size: int, *, symmetric: bool = False, scale_dtype: torch.dtype = torch.float32
) -> QuantW4:
    """Round `weight` [N, K] to the nearest of 16 levels per group of `group_size` input channels.

    The asymmetric grid always contains zero. The symmetric grid has its zero at 8 and scales the largest
    magnitude to 7. With either, every error is at most half a step.

    Args:
        weight: [N, K], any float dtype.
        group_size: must divide K.
        symmetric: fix the zero point at 8.
        scale_dtype: what the kernel reads. Scales are rounded to it, upwards, before the weights are rounded,
            so that no weight falls off the end of the grid.
    """
    values = _checked(weight)
    n, k = values.shape
    if k % group_size:
        raise KernelError(f"group size {group_size} does not divide K={k}; use {choose_group_size(k)}")
    groups = values.view(n, k // group_size, group_size)
    if symmetric:
        scale = _usable(_round_up(groups.abs().amax(dim=-1) / (_W4_MAX - _W4_SYM_ZERO), scale_dtype))
        zero = torch.full_like(scale, _W4_SYM_ZERO, dtype=torch.float32)
    else:
        low = groups.amin(dim=-1).clamp_(max=0)
        high = groups.amax(dim=-1).clamp_(min=0)
        # Two divisions: high - low may overflow fp32 where each end does not.
        scale = _usable(_round_up(high / _W4_MAX - low / _W4_MAX, scale_dtype))
        zero = (-low / scale.float()).round_().clamp_(0, _W4_MAX)
    steps = (groups / scale.float()[..., None]).round_().add_(zero[..., None]).clamp_(0, _W4_MAX)
    return QuantW4(steps.to(torch.uint8).view(n, k), scale, zero.to(torch.uint8))


def regroup(q: Tensor, scale: Tensor, zero: Tensor) -> QuantW4:
    """Groups as wide as the values allow, for a slice that may have cut through the groups it was made with.

    Args:
        q: uint8 [N, K].
        scale, zero: [N, K], what applies to each weight.

    Raises:
        KernelError: they change within 32 input channels.
    """
    n, k = q.shape
    for size in IMPORTED_GROUP_SIZES:
        if k % size:
            continue
        scales, zeros = scale.view(n, -1, size), zero.view(n, -1, size)
        if bool((scales == scales[..., :1]).all()) and bool((zeros == zeros[..., :1]).all()):
            return QuantW4(q, scales[..., 0].contiguous(), zeros[..., 0].contiguous())
    raise KernelError(
        f"a weight [N={n}, K={k}] has groups that are no multiple of {IMPORTED_GROUP_SIZES[-1]} input channels on this "
        "rank; choose another tensor-parallel size, or another group size when quantizing"
    )


def dequantize_w8(quant: QuantW8) -> Tensor:
    """fp32 [N, K]."""
    return quant.q.float() * quant.scale.float()[:, None]


def dequantize_w4(quant: QuantW4) -> Tensor:
    """fp32 [N, K]."""
    n, k = quant.q.shape
    groups = quant.q.view(n, -1, quant.group_size).float() - quant.zero.float()[..., None]
    return (groups * quant.scale.float()[..., None]).view(n, k)


def pack_w8_vnni(q: Tensor) -> Tensor:
    """Tile int8 [N, K] for four-way int8 dot products: int8 [N, K + 4].

    Each block of 32 output channels holds its weights as [K / 4, 32, 4] and then 32 int32: 128 times the
    channel's sum, which takes back the offset that makes the activations unsigned.
    """
    n, k = q.shape
    tiles = q.view(n // TILE_N, TILE_N, k // 4, 4).permute(0, 2, 1, 3).reshape(n // TILE_N, TILE_N * k)
    sums = q.sum(dim=1, dtype=torch.int32).mul_(128).view(n // TILE_N, TILE_N).view(torch.int8)
    return torch.cat((tiles, sums), dim=1).view(n, k + _COMP_BYTES)


def unpack_w8_vnni(packed: Tensor) -> Tensor:
    """Inverse of `pack_w8_vnni`: int8 [N, K]."""
    n, k = packed.shape[0], packed.shape[1] - _COMP_BYTES
    tiles = packed.reshape(n // TILE_N, -1)[:, : TILE_N * k]
    return tiles.reshape(n // TILE_N, k // 4, TILE_N, 4).permute(0, 2, 1, 3).reshape(n, k)


def pack_w4_vnni(quant: QuantW4) -> dict[str, Tensor]:
    """Tile 4-bit weights for four-way int8 dot products, one block per 32 output channels and group.

    Returns:
        weight: uint8 [N / 32, G, 16 * group_size + 128]; each block ends in 128 bytes:
            the channels' int32 sums of (q - zero).
        zero: int8 [N / 32, G, 32]. scale: fp32 [N / 32, G, 32].
    """
    n, k = quant.q.shape
    size, blocks, groups = quant.group_size, n // TILE_N, k // quant.group_size
    # Channel = 16 * pair + 8 * half + lane; a byte holds half 0 in its low and half 1 in its high nibble.
    q = quant.q.view(blocks, 2, 2, 8, groups, size // 4, 4).permute(0, 4, 5, 1, 3, 6, 2)
    nibbles = (q[..., 0] | (q[..., 1] << 4)).reshape(blocks, groups, size * TILE_N // 2)
    sums = quant.q.view(n, groups, size).sum(dim=-1, dtype=torch.int32) - size * quant.zero.int()
    tail = _by_block(sums).view(torch.uint8)
    return {
        "weight": torch.cat((nibbles, tail), dim=-1),
        "zero": _by_block(quant.zero).to(torch.int8),
        "scale": _by_block(quant.scale.float()),
    }


def unpack_w4_vnni(packed: dict[str, Tensor]) -> QuantW4:
    """Inverse of `pack_w4_vnni`."""
    weight = packed["weight"]
    blocks, groups = weight.shape[:2]
    size = _w4_vnni_group(weight)
    nibbles = weight[..., : size * TILE_N // 2].reshape(blocks, groups, size // 4, 2, 8, 4)
    halves = torch.stack((nibbles & 15, nibbles >> 4), dim=-1)
    q = halves.permute(0, 3, 6, 4, 1, 2, 5).reshape(blocks * TILE_N, groups * size)
    return QuantW4(q, _by_channel(packed["scale"]), _by_channel(packed["zero"]).to(torch.uint8))


def w4_vnni_shape(weight: Tensor) -> tuple[int, int]:
    """(N, K) of a weight laid out by `pack_w4_vnni`."""
    return weight.shape[0] * TILE_N, weight.shape[1] * _w4_vnni_group(weight)


def pack_w4_int32(quant: QuantW4) -> dict[str, Tensor]:
    """Layout of the weight-only kernel: blocks of 16 output channels, eight channels in one int32.

    Returns:
        weight: int32 [N / 16, 2 K]. zero: int32 [G, N / 8]. scale: [G, N], dtype as quantized.
    """
    n, k = quant.q.shape
    words = _to_words(quant.q.t())
    weight = words.view(k, n // 16, 2).permute(1, 0, 2).reshape(n // 16, 2 * k)
    return {"weight": weight, "zero": _to_words(quant.zero.t()), "scale": quant.scale.t().contiguous()}


def unpack_w4_int32(packed: dict[str, Tensor]) -> QuantW4:
    """Inverse of `pack_w4_int32`."""
    weight = packed["weight"]
    blocks, k = weight.shape[0], weight.shape[1] // 2
    words = weight.view(blocks, k, 2).permute(1, 0, 2).reshape(k, 2 * blocks)
    q = _from_words(words).t().contiguous()
    return QuantW4(q, packed["scale"].t().contiguous(), _from_words(packed["zero"]).t().contiguous())


def pack_w4_columns(quant: QuantW4) -> dict[str, Tensor]:
    """Layout of our Triton kernel: eight input channels in one int32.

    Returns:
        weight: int32 [K / 8, N]. zero: uint8 [G, N]. scale: [G, N], dtype as quantized.
    """
    words = _to_words(quant.q).t().contiguous()
    return {"weight": words, "zero": quant.zero.t().contiguous(), "scale": quant.scale.t().contiguous()}


def unpack_w4_columns(packed: dict[str, Tensor]) -> QuantW4:
    """Inverse of `pack_w4_columns`."""
    q = _from_words(packed["weight"].t())
    return QuantW4(q, packed["scale"].t().contiguous(), packed["zero"].t().contiguous())


def _checked(weight: Tensor) -> Tensor:
    """`weight` as contiguous fp32, refused unless it is a finite matrix."""
    if weight.dim() != 2:
        raise KernelError(f"expected a weight [N, K], got {tuple(weight.shape)}; flatten it first")
    values = weight.detach().to(torch.float32).contiguous()
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise KernelError(
            f"{bad} of {values.numel()} weights are not finite, allowed are 0; the checkpoint is damaged or "
            "was not loaded to its end: fetch it again"
        )
    return values


def _usable(scale: Tensor) -> Tensor:
    """An all-zero (or underflowing) channel has no step of its own; any positive one represents it."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 `scale` in `dtype`, never below the exact value."""
    if dtype == torch.float32:
        return scale
    rounded = scale.to(dtype)
    bits = rounded.view(torch.int16)  # positive floats order like their bit patterns
    return torch.where(rounded.float() < scale, bits + 1, bits).view(dtype)


def _w4_vnni_group(weight: Tensor) -> int:
    return (weight.shape[2] - TILE_N * _COMP_BYTES) // (TILE_N // 2)


def _by_block(per_group: Tensor) -> Tensor:
    """[N, G] -> [N / 32, G, 32]."""
    n, groups = per_group.shape
    return per_group.view(n // TILE_N, TILE_N, groups).permute(0, 2, 1).contiguous()


def _by_channel(blocked: Tensor) -> Tensor:
    """[N / 32, G, 32] -> [N, G]."""
    return blocked.permute(0, 2, 1).reshape(-1, blocked.shape[1]).contiguous()


def _to_words(nibbles: Tensor) -> Tensor:
    """uint8 [R, C] with values 0..15 -> int32 [R, C / 8], the first value in the lowest bits."""
    pairs = nibbles.contiguous().view(nibbles.shape[0], -1, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous().view(torch.int32)


def _from_words(words: Tensor) -> Tensor:
    """Inverse of `_to_words`."""
    packed = words.contiguous().view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(words.shape[0], -1)
