"""The byte layouts of the kernels, and back: pure torch, provably without loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quant_layers.formats.canonical import QuantW4

TILE_N = 32  # output channels in one block of the VNNI kernels
PANEL_N = 16  # those of our own (kPanel in csrc/int16_linear.h)
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
    """Invert `pack_w8_vnni`: int8 [N, K]."""
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
    """Invert `pack_w4_vnni`."""
    weight = packed["weight"]
    blocks, groups = weight.shape[:2]
    size = _w4_vnni_group(weight)
    nibbles = weight[..., : size * TILE_N // 2].reshape(blocks, groups, size // 4, 2, 8, 4)
    halves = torch.stack((nibbles & 15, nibbles >> 4), dim=-1)
    q = halves.permute(0, 3, 6, 4, 1, 2, 5).reshape(blocks * TILE_N, groups * size)
    return QuantW4(q, _by_channel(packed["scale"]), _by_channel(packed["zero"]).to(torch.uint8))


def w4_vnni_shape(weight: Tensor) -> tuple[int, int]:
    """Return (N, K) of a weight laid out by `pack_w4_vnni`."""
    return weight.shape[0] * TILE_N, weight.shape[1] * _w4_vnni_group(weight)


def pack_w4_int32(quant: QuantW4) -> dict[str, Tensor]:
    """Lay out for the weight-only kernel: blocks of 16 output channels, eight channels in one int32.

    Returns:
        weight: int32 [N / 16, 2 K]. zero: int32 [G, N / 8]. scale: [G, N], dtype as quantized.
    """
    n, k = quant.q.shape
    words = _to_words(quant.q.t())
    weight = words.view(k, n // 16, 2).permute(1, 0, 2).reshape(n // 16, 2 * k)
    return {"weight": weight, "zero": _to_words(quant.zero.t()), "scale": quant.scale.t().contiguous()}


def unpack_w4_int32(packed: dict[str, Tensor]) -> QuantW4:
    """Invert `pack_w4_int32`."""
    weight = packed["weight"]
    blocks, k = weight.shape[0], weight.shape[1] // 2
    words = weight.view(blocks, k, 2).permute(1, 0, 2).reshape(k, 2 * blocks)
    q = _from_words(words).t().contiguous()
    return QuantW4(q, packed["scale"].t().contiguous(), _from_words(packed["zero"]).t().contiguous())


def pack_w4_columns(quant: QuantW4) -> dict[str, Tensor]:
    """Lay out for our Triton kernel: eight input channels in one int32.

    Returns:
        weight: int32 [K / 8, N]. zero: uint8 [G, N]. scale: [G, N], dtype as quantized.
    """
    words = _to_words(quant.q).t().contiguous()
    return {"weight": words, "zero": quant.zero.t().contiguous(), "scale": quant.scale.t().contiguous()}


def unpack_w4_columns(packed: dict[str, Tensor]) -> QuantW4:
    """Invert `pack_w4_columns`."""
    q = _from_words(packed["weight"].t())
    return QuantW4(q, packed["scale"].t().contiguous(), packed["zero"].t().contiguous())


def pack_w8_panels(q: Tensor) -> Tensor:
    """Lay out int8 [N, K] as [N / 16, K / 2, 16, 2]: what one vector of 16-bit multiplications takes lies together."""
    n, k = q.shape
    return q.view(n // PANEL_N, PANEL_N, k // 2, 2).permute(0, 2, 1, 3).contiguous()


def unpack_w8_panels(packed: Tensor) -> Tensor:
    """Invert `pack_w8_panels`: int8 [N, K]."""
    panels, pairs = packed.shape[:2]
    return packed.permute(0, 2, 1, 3).reshape(panels * PANEL_N, 2 * pairs)


def pack_w4_panels(quant: QuantW4) -> dict[str, Tensor]:
    """Put four pairs of input channels in two 16-bit words, so that a shift and a mask give one pair.

    Returns:
        weight: uint8 [N / 16, K / 8, 16, 4]; input channel 2 i + word is nibble i of a word.
        zero: uint8 [N / 16, G, 16]. scale: fp32 [N / 16, G, 16].
    """
    n, k = quant.q.shape
    q = quant.q.view(n // PANEL_N, PANEL_N, k // 8, 2, 2, 2)  # [..., byte of its word, nibble of its byte, word]
    weight = (q[..., 0, :] | (q[..., 1, :] << 4)).permute(0, 2, 1, 4, 3)
    return {
        "weight": weight.reshape(n // PANEL_N, k // 8, PANEL_N, 4).contiguous(),
        "zero": _by_block(quant.zero, PANEL_N),
        "scale": _by_block(quant.scale.float(), PANEL_N),
    }


def unpack_w4_panels(packed: Mapping[str, Tensor]) -> QuantW4:
    """Invert `pack_w4_panels`."""
    weight = packed["weight"]
    panels, eights = weight.shape[:2]
    bytes_ = weight.view(panels, eights, PANEL_N, 2, 2).permute(0, 2, 1, 4, 3)  # [..., byte of its word, word]
    q = torch.stack((bytes_ & 15, bytes_ >> 4), dim=-2).reshape(panels * PANEL_N, 8 * eights)
    return QuantW4(q, _by_channel(packed["scale"]), _by_channel(packed["zero"]))


def _w4_vnni_group(weight: Tensor) -> int:
    return (weight.shape[2] - TILE_N * _COMP_BYTES) // (TILE_N // 2)


def _by_block(per_group: Tensor, size: int = TILE_N) -> Tensor:
    """Turn [N, G] into [N / size, G, size]."""
    n, groups = per_group.shape
    return per_group.view(n // size, size, groups).permute(0, 2, 1).contiguous()


def _by_channel(blocked: Tensor) -> Tensor:
    """Invert `_by_block`."""
    return blocked.permute(0, 2, 1).reshape(-1, blocked.shape[1]).contiguous()


def _to_words(nibbles: Tensor) -> Tensor:
    """Turn uint8 [R, C] with values 0..15 into int32 [R, C / 8], the first value in the lowest bits."""
    pairs = nibbles.contiguous().view(nibbles.shape[0], -1, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous().view(torch.int32)


def _from_words(words: Tensor) -> Tensor:
    """Invert `_to_words`."""
    packed = words.contiguous().view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(words.shape[0], -1)
