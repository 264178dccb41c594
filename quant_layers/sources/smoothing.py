"""Fewer outliers for W8: large activation channels are scaled down, the weights that read them up.

W8 rounds the activations of a token with one step, which its largest channel sets. Dividing a channel by s and
multiplying the weight's column by s changes nothing at full precision, and lets both round with a finer step
(SmoothQuant, arXiv 2211.10438, equation 4; there with one exponent, here the best of a few for each linear). The
division costs no time, because what produces the channel takes it in: the norm before it, or the rows of the up
projection. Only tensors of the same decoder layer change, so a smoothed layer fits between any two others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quant_layers.errors import QuantError
from quant_layers.formats.canonical import quantize_w8

EXPONENTS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # 0.0 stands for "leave it as it is"
_TINY = 1e-6
_SPAN = 1e3  # no channel is scaled by more than this: s must stay harmless in bf16


@dataclass(frozen=True, slots=True)
class Fold:
    """The place where a linear's scaled input comes from, by names inside a decoder layer as vLLM fuses it."""

    consumer: str
    producer: str
    how: Literal["norm", "upper_rows"]  # upper_rows: the second half of a fused gate-up projection


FOLDS = (
    # down first: it changes the rows of gate_up, whose own columns are looked at next
    Fold("mlp.down_proj", "mlp.gate_up_proj", "upper_rows"),
    Fold("mlp.gate_up_proj", "pre_feedforward_layernorm", "norm"),  # Gemma 2 and 3
    Fold("mlp.gate_up_proj", "post_attention_layernorm", "norm"),
    Fold("self_attn.qkv_proj", "input_layernorm", "norm"),
)


def folds_of(names: set[str]) -> tuple[Fold, ...]:
    """Return the folds that a layer with these linears and norms has, at most one for each consumer."""
    found: dict[str, Fold] = {}
    for fold in FOLDS:
        if fold.consumer in names and fold.producer in names:
            found.setdefault(fold.consumer, fold)
    return tuple(found.values())


@dataclass(frozen=True, slots=True)
class Scale:
    """The divisors of one linear's input channels, and what they are worth."""

    values: Tensor  # fp32 [K]
    exponent: float
    error: float  # mean over tokens of the output's squared error over its power
    error_plain: float  # the same without scaling


def choose_scale(x: Tensor, weight: Tensor) -> Scale:
    """Choose the best of `EXPONENTS` for one linear, judged by its output in W8A8 arithmetic.

    Args:
        x: calibration inputs [num_tokens, K].
        weight: [N, K], all linears that read `x`.
    """
    x, weight = x.float(), weight.float()
    exact = x @ weight.t()
    power = exact.square().sum(dim=1).clamp_min(_TINY)
    plain = error = _token_error(x, weight, exact, power)
    best, exponent = torch.ones(x.shape[1]), 0.0
    peaks, columns = x.abs().amax(dim=0).clamp_min(_TINY), weight.abs().amax(dim=0).clamp_min(_TINY)
    for candidate in EXPONENTS[1:]:
        scale = peaks**candidate / columns ** (1 - candidate)
        scale = (scale / scale.log().mean().exp()).clamp(1 / _SPAN, _SPAN)
        found = _token_error(x / scale, weight * scale, exact, power)
        if found < error:
            best, exponent, error = scale, candidate, found
    return Scale(best, exponent, error, plain)


def _token_error(x: Tensor, weight: Tensor, exact: Tensor, power: Tensor) -> float:
    """Return the error relative to each token's own power: a few tokens are hundreds of times larger than others."""
    step = x.abs().amax(dim=1, keepdim=True).clamp_min(_TINY) / 127
    rounded = (x / step).round_() * step
    out = rounded @ quantize_w8(weight).dequantize().t()
    return float(((out - exact).square().sum(dim=1) / power).mean())


def apply_scales(
    weights: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
    norm_offset: float,
    scales: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fold scales into one layer.

    A norm is kept in the dtype it has; the columns take what its rounding really divided by.

    Args:
        weights: [N, K] by linear name; a gate-up projection has the gate in its first N / 2 rows.
        norms: [K] by name.
        norm_offset: what the norm adds to its weight (1 for Gemma, else 0).
        scales: [K] by consumer, sliced as `weights` are.

    Returns:
        All linears (fp32 where touched), and the norms that changed.

    Raises:
        QuantError: a scale for a linear that has no fold, or of another size.
    """
    folds = {fold.consumer: fold for fold in folds_of(set(weights) | set(norms))}
    if unknown := set(scales) - set(folds):
        raise QuantError(f"no way to scale the inputs of {sorted(unknown)} here; known are {sorted(folds)}")
    new = dict(weights)
    new_norms: dict[str, Tensor] = {}
    for consumer, fold in folds.items():
        if consumer not in scales:
            continue
        scale = scales[consumer].float()
        if scale.shape != (weights[consumer].shape[1],):
            raise QuantError(
                f"scale of {consumer} is {tuple(scale.shape)}, its input has {weights[consumer].shape[1]} channels"
            )
        if fold.how == "norm":
            old = norms[fold.producer]
            new_norms[fold.producer] = ((old.float() + norm_offset) / scale - norm_offset).to(old.dtype)
            divided = new_norms[fold.producer].float() + norm_offset
            # A channel that the norm silences is zero with any scale.
            scale = torch.where(divided != 0, (old.float() + norm_offset) / divided, torch.ones_like(scale))
        else:
            rows = new[fold.producer].float().clone()
            rows[rows.shape[0] // 2 :] /= scale[:, None]
            new[fold.producer] = rows
        new[consumer] = new[consumer].float() * scale
    return new, new_norms
