"""What a quantized weight means, whatever kernel reads it: the canonical forms, and rounding to nearest.

A canonical form is one class for one format: values `q` [N, K] with scales, and what can be said of them without
knowing a kernel. Everything here is pure torch, so that what a kernel computes can be proven against arithmetic
that does not share a line with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant_layers.errors import KernelError

GROUP_SIZES = (64, 32)  # tried in this order; 128 divides too few hidden sizes to be worth a layout
IMPORTED_GROUP_SIZES = (128, *GROUP_SIZES)  # what others quantized may come in
_W8_MAX = 127  # -128 is left out: the grid stays symmetric
_W4_MAX = 15
_W4_SYM_ZERO = 8
_PIECE = 1 << 22  # weights that are rounded at a time: widened to fp32, several times over


class Quant(ABC):
    """A quantized weight in its format's canonical form. Each row is rounded by itself: all fields are [N, ...]."""

    format: ClassVar[str]  # as users write it: no "/", which stands between the formats of two halves
    bits: ClassVar[int]  # of one weight, without scales
    coarsest_levels: ClassVar[int]  # steps between a row's -max and max, were the grid as coarse as at its ends
    per_row: ClassVar[bool]  # one scale a row: then scaling input channels before rounding can lose less
    int8_activations: ClassVar[bool]  # whether the kernels that usually run it round these, token by token

    q: Tensor  # [N, K]
    scale: Tensor

    @classmethod
    @abstractmethod
    def of(cls, weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> Quant:
        """Round `weight` [N, K] to nearest.

        Args:
            weight: any float dtype.
            scale_dtype: what the kernel reads scales in. They are rounded to it, upwards, before the weights are
                rounded, so that no weight falls off the end of the grid.
        """

    @classmethod
    @abstractmethod
    def packed_bytes(cls, n: int, k: int) -> int:
        """Estimate what a weight [n, k] takes, scales included, as CPU kernels lay it out; for planning."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Return what it means: fp32 [N, K]."""


@dataclass(frozen=True, slots=True)
class QuantW8(Quant):
    """A symmetric weight, one scale per output channel: weight = q * scale."""

    q: Tensor  # int8 [N, K], -127..127
    scale: Tensor  # [N]

    format = "w8"
    bits = 8
    coarsest_levels = 255
    per_row = True
    int8_activations = True

    @classmethod
    def of(cls, weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> QuantW8:
        return quantize_w8(weight, scale_dtype=scale_dtype)

    @classmethod
    def packed_bytes(cls, n: int, k: int) -> int:
        return n * k + 8 * n  # compensation and scale of every row

    def dequantize(self) -> Tensor:
        return self.q.float() * self.scale.float()[:, None]


@dataclass(frozen=True, slots=True)
class QuantW4(Quant):
    """A weight grouped along K, with zero points: weight = (q - zero) * scale."""

    q: Tensor  # uint8 [N, K], 0..15
    scale: Tensor  # [N, K / group_size]
    zero: Tensor  # uint8 [N, K / group_size], 0..15

    format = "w4"
    bits = 4
    coarsest_levels = 15
    per_row = False
    int8_activations = True

    @property
    def group_size(self) -> int:
        """Input channels that share one scale."""
        return self.q.shape[1] // self.scale.shape[1]

    @classmethod
    def of(cls, weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> QuantW4:
        return quantize_w4(weight, choose_group_size(weight.shape[1]), scale_dtype=scale_dtype)

    @classmethod
    def packed_bytes(cls, n: int, k: int) -> int:
        return n * k // 2 + 9 * n * (k // choose_group_size(k))  # compensation, zero point and scale of every group

    def dequantize(self) -> Tensor:
        n, k = self.q.shape
        groups = self.q.view(n, -1, self.group_size).float() - self.zero.float()[..., None]
        return (groups * self.scale.float()[..., None]).view(n, k)


def round_in_pieces(canonical: type[Quant], weight: Tensor, scale_dtype: torch.dtype) -> Quant:
    """Round as `canonical.of`, some rows at a time: a large linear in fp32 would take more memory than its layer."""
    if weight.numel() <= _PIECE or not is_dataclass(canonical):
        return canonical.of(weight, scale_dtype)
    rows = max(1, _PIECE // weight.shape[1])
    pieces = [canonical.of(weight[start : start + rows], scale_dtype) for start in range(0, len(weight), rows)]
    return canonical(**{f.name: torch.cat([getattr(piece, f.name) for piece in pieces]) for f in fields(canonical)})


def group_of_slice(size: int, k: int) -> int:
    """Return the widest groups that `regroup` finds in a slice of `k` input channels of what has groups of `size`.

    Args:
        size: not positive: one scale a row.

    Returns:
        0 where no group that kernels take fits.
    """
    fits = (group for group in IMPORTED_GROUP_SIZES if k % group == 0 and (size <= 0 or size % group == 0))
    return next(fits, 0)


def choose_group_size(k: int) -> int:
    """Return the largest supported group size that divides `k`.

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


def quantize_w8(weight: Tensor, *, scale_dtype: torch.dtype = torch.float32) -> QuantW8:
    """Round `weight` [N, K] to the nearest of 255 levels per output channel. See `Quant.of`."""
    values = finite_matrix(weight)
    scale = usable_scale(round_up(values.abs().amax(dim=1) / _W8_MAX, scale_dtype))
    q = (values / scale.float()[:, None]).round_().clamp_(-_W8_MAX, _W8_MAX).to(torch.int8)
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
    values = finite_matrix(weight)
    n, k = values.shape
    if k % group_size:
        raise KernelError(f"group size {group_size} does not divide K={k}; use {choose_group_size(k)}")
    groups = values.view(n, k // group_size, group_size)
    if symmetric:
        scale = usable_scale(round_up(groups.abs().amax(dim=-1) / (_W4_MAX - _W4_SYM_ZERO), scale_dtype))
        zero = torch.full_like(scale, _W4_SYM_ZERO, dtype=torch.float32)
    else:
        low = groups.amin(dim=-1).clamp_(max=0)
        high = groups.amax(dim=-1).clamp_(min=0)
        # Two divisions: high - low may overflow fp32 where each end does not.
        scale = usable_scale(round_up(high / _W4_MAX - low / _W4_MAX, scale_dtype))
        zero = (-low / scale.float()).round_().clamp_(0, _W4_MAX)
    steps = (groups / scale.float()[..., None]).round_().add_(zero[..., None]).clamp_(0, _W4_MAX)
    return QuantW4(steps.to(torch.uint8).view(n, k), scale, zero.to(torch.uint8))


def regroup(q: Tensor, scale: Tensor, zero: Tensor) -> QuantW4:
    """Make groups as wide as the values allow, for a slice that may have cut through the groups it was made with.

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


def finite_matrix(weight: Tensor) -> Tensor:
    """Return `weight` as contiguous fp32, refused unless it is a finite matrix."""
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


def usable_scale(scale: Tensor) -> Tensor:
    """Replace scales of 0: an all-zero (or underflowing) channel has no step; any positive one represents it."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 `scale` in `dtype`, never below the exact value."""
    if dtype == torch.float32:
        return scale
    rounded = scale.to(dtype)
    bits = rounded.view(torch.int16)  # positive floats order like their bit patterns
    return torch.where(rounded.float() < scale, bits + 1, bits).view(dtype)
