"""By how much rounding to nearest can move a weight: what formats and kernels are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_layers import Quant

_E4M3_BIAS, _E4M3_MANTISSA_BITS = 7, 3


def half_step(quant: Quant) -> Tensor:
    """The most by which each weight can have been moved: fp32 [N, K].

    Grids are even but for fp8's; one that is not belongs here, like fp8's.
    """
    n, k = quant.q.shape
    scale = quant.scale.float().view(n, -1)
    steps = scale.repeat_interleave(k // scale.shape[1], dim=1)
    if quant.q.dtype == torch.float8_e4m3fn:
        steps = steps * _e4m3_steps(quant.q)
    return steps / 2


def _e4m3_steps(q: Tensor) -> Tensor:
    """The distance of each value from the next one away from zero, read from its bits: fp32."""
    exponent = (q.view(torch.uint8) & 0x7F) >> _E4M3_MANTISSA_BITS
    # Exponents 0 (subnormal) and 1 share a step.
    return torch.exp2(exponent.clamp_min(1).float() - _E4M3_BIAS - _E4M3_MANTISSA_BITS)
