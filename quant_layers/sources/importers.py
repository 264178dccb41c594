"""What quantized checkpoints mean, in the canonical form: GPTQ, AWQ (GEMM) and compressed-tensors.

Each reader takes the tensors of one linear as they lie in the file and gives integers with scales. Layouts as
in vLLM's model_executor/layers/quantization (auto_gptq.py, auto_awq.py, compressed_tensors/schemes).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant_layers.errors import CheckpointError
from quant_layers.formats.canonical import QuantW4, QuantW8

Parts = Mapping[str, Tensor]  # tensor name below the linear |-> tensor

_WORD_BITS = 32
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of an AWQ word in which column i lies
_MARKS = ("qweight", "weight_packed", "weight_scale")  # a linear that has one of these is quantized


@dataclass(frozen=True, slots=True)
class Scheme:
    """The part of a checkpoint's quantization config that its tensors do not say themselves."""

    method: str  # "gptq", "awq" or "compressed-tensors"
    bits: int  # of GPTQ and AWQ; compressed-tensors say it tensor by tensor
    symmetric: bool
    zero_offset: int  # added to GPTQ zero points: 1 in version 1 of the format, 0 in version 2
    # Input channels that share a scale, for choosing a kernel; not positive: all of a row; empty: it does not say.
    # No part of `repr`, which names what older versions packed: the tensors tell their groups themselves.
    group_sizes: tuple[int, ...] = field(default=(), repr=False)


def is_quantized(parts: Collection[str]) -> bool:
    """Return whether a linear with tensors of these names is stored in any quantized form."""
    return any(mark in parts for mark in _MARKS)


def read_linear(name: str, parts: Parts, scheme: Scheme) -> QuantW4 | QuantW8:
    """Read one linear into the canonical form, input channels in their own order.

    Args:
        name: of the linear, for messages.
        parts: all its tensors but the bias.
        scheme: of the checkpoint.

    Raises:
        CheckpointError: act-order, a width or a layout that no kernel here runs, or tensors that do not fit.
    """
    try:
        if "qweight" in parts:
            return _read_gptq(name, parts, scheme) if scheme.method == "gptq" else _read_awq(name, parts, scheme)
        if "weight_packed" in parts:
            return _read_pack_quantized(name, parts)
        if parts["weight"].dtype == torch.int8:
            return _read_int8(name, parts)
    except KeyError as error:
        raise CheckpointError(f"{name} has {sorted(parts)}, it lacks {error}; fetch the checkpoint again") from error
    except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:  # shapes, most likely
        raise CheckpointError(f"{name}: its tensors do not fit each other ({error}); fetch it again") from error
    raise CheckpointError(
        f"{name} is stored as {parts['weight'].dtype}, which no kernel here runs; known are 4-bit GPTQ, AWQ and "
        "pack-quantized, and int8 per channel"
    )


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Turn int32 [R, C] into uint8 [R, C * 32 / bits], the first value in the lowest bits."""
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32)
    values = (words.int().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)  # the mask takes the copied sign away
    return values.to(torch.uint8).flatten(-2)


def _read_gptq(name: str, parts: Parts, scheme: Scheme) -> QuantW4 | QuantW8:
    """Read qweight [K * bits / 32, N] packed along K, scales [G, N], qzeros [G, N * bits / 32], g_idx [K]."""
    q = unpack_words(parts["qweight"].t().contiguous(), scheme.bits)  # [N, K]
    scale = parts["scales"].t().contiguous()
    if "g_idx" in parts:
        _require_trivial(name, parts["g_idx"], scale.shape[1])
    if scheme.symmetric:
        zero = torch.full(scale.shape, 1 << (scheme.bits - 1), dtype=torch.uint8)
    else:
        stored = unpack_words(parts["qzeros"], scheme.bits).t().contiguous()
        zero = (stored + scheme.zero_offset) & ((1 << scheme.bits) - 1)  # a zero point of 0 is stored as all ones
    return _canonical(name, q, scale, zero, scheme.bits)


def _read_awq(name: str, parts: Parts, scheme: Scheme) -> QuantW4 | QuantW8:
    """Read qweight [K, N / 8] packed along N, scales [G, N], qzeros [G, N / 8]; columns interleaved in each word."""
    if scheme.bits != 4:
        raise CheckpointError(f"{name}: AWQ with {scheme.bits} bits; known is 4")

    def ordered(words: Tensor) -> Tensor:
        values = unpack_words(words, 4)
        return values.view(len(values), -1, 8)[..., _AWQ_ORDER].flatten(-2).t().contiguous()

    q, scale = ordered(parts["qweight"]), parts["scales"].t().contiguous()
    zero = ordered(parts["qzeros"]) if "qzeros" in parts else torch.full(scale.shape, 8, dtype=torch.uint8)
    return _canonical(name, q, scale, zero, 4)


def _read_pack_quantized(name: str, parts: Parts) -> QuantW4 | QuantW8:
    """Read weight_packed [N, K * bits / 32], weight_scale [N, G] and weight_zero_point [N * bits / 32, G]."""
    n, k = (int(size) for size in parts["weight_shape"])
    bits = _WORD_BITS * parts["weight_packed"].shape[1] // k
    if bits not in (4, 8) or parts["weight_packed"].shape != (n, k * bits // _WORD_BITS):
        raise CheckpointError(
            f"{name}: {tuple(parts['weight_packed'].shape)} words for a weight [{n}, {k}] are {bits} bits each; "
            "known are 4 and 8, in whole words"
        )
    q, scale = unpack_words(parts["weight_packed"], bits), parts["weight_scale"]
    if "weight_g_idx" in parts:
        _require_trivial(name, parts["weight_g_idx"], scale.shape[1])
    if "weight_zero_point" in parts:
        zero = unpack_words(parts["weight_zero_point"].t().contiguous(), bits).t().contiguous()
    else:
        zero = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8)
    return _canonical(name, q, scale, zero, bits)


def _read_int8(name: str, parts: Parts) -> QuantW8:
    """Read weight int8 [N, K], weight_scale [N, 1] or one for the whole matrix."""
    for unwanted, what in (("weight_zero_point", "zero points"), ("input_scale", "activation scales")):
        if unwanted in parts and (unwanted == "input_scale" or parts[unwanted].count_nonzero()):
            raise CheckpointError(
                f"{name} has {what} ({unwanted}), which the int8 kernels here do not take: they round activations "
                "token by token, symmetrically. Make the checkpoint with dynamic symmetric W8A8."
            )
    scale = parts["weight_scale"].float().reshape(-1)
    n = parts["weight"].shape[0]
    if len(scale) not in (1, n):
        raise CheckpointError(f"{name} has {len(scale)} scales for {n} rows; int8 wants one a row, or one")
    return QuantW8(parts["weight"].contiguous(), scale.expand(n).contiguous())


def _canonical(name: str, q: Tensor, scale: Tensor, zero: Tensor, bits: int) -> QuantW4 | QuantW8:
    n, k = q.shape
    if scale.shape[0] != n or zero.shape != scale.shape or k % scale.shape[1]:
        raise CheckpointError(
            f"{name}: weight [{n}, {k}], scales {tuple(scale.shape)} and zero points {tuple(zero.shape)} do not "
            "go together; fetch the checkpoint again"
        )
    if bits == 4:
        return QuantW4(q, scale, zero)
    if bits == 8 and scale.shape[1] == 1 and bool((zero == 128).all()):
        return QuantW8((q.short() - 128).to(torch.int8), scale.float().reshape(-1))
    raise CheckpointError(
        f"{name}: {bits} bits in {scale.shape[1]} groups a row; known are 4 bits, and 8 bits symmetric with one "
        "scale a row. Leave this format out of `variants`: w8 made here loses less than 4 bits do."
    )


def _require_trivial(name: str, group_of: Tensor, num_groups: int) -> None:
    """Refuse channels that are not in their own order, as with act-order.

    Raises:
        CheckpointError: they are not.
    """
    k = len(group_of)
    expected = torch.arange(k) // -(-k // num_groups)
    if not torch.equal(group_of.long(), expected):
        raise CheckpointError(
            f"{name} was quantized in activation order (desc_act): its groups are scattered over the input "
            "channels, and reading them in order would need a gather in every forward pass, which vLLM has given "
            "up too. Quantize with desc_act false, or with static act-order."
        )
