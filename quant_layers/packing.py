"""The byte layouts of the kernels, and back: pure torch, provably without loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .neutral import QuantW4

TILE_N = 32  # output channels in one block of the VNNI kernels
_COMP_BYTES = 4  # one int32 of compensation per output channel and block


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
