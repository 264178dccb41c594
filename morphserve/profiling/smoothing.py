"""Scales for W8 from calibration text (see quant_layers/smoothing.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from morphserve.errors import ProfilingError
from morphserve.profiling.stream import Calibration, decoder_layers
from quant_layers import Scale, choose_scale, folds_of

# What vLLM fuses into one linear, by the names in transformers.
_PARTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "self_attn.qkv_proj": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.qkv_proj",)),
    "mlp.gate_up_proj": (("mlp.gate_proj", "mlp.up_proj"), ("mlp.gate_up_proj",)),
    "mlp.down_proj": (("mlp.down_proj",),),
}


def fused_linears(layer: nn.Module) -> dict[str, list[nn.Linear]]:
    """Linears of a transformers decoder layer under the names that vLLM gives them once fused."""
    modules = dict(layer.named_modules())
    found: dict[str, list[nn.Linear]] = {}
    for fused, alternatives in _PARTS.items():
        for names in alternatives:
            parts = [modules[name] for name in names if isinstance(modules.get(name), nn.Linear)]
            if len(parts) == len(names):
                found[fused] = parts  # type: ignore[assignment]
    return found


def smooth_model(
    model: nn.Module, windows: Tensor, on_layer: Callable[[int, dict[str, Scale]], Any]
) -> dict[int, dict[str, Scale]]:
    """Scales for every layer.

    Args:
        model: a transformers causal language model.
        windows: token ids [num_windows, num_tokens].
        on_layer: hears of each layer as it is done.

    Raises:
        ProfilingError: the layers have nothing that could be scaled.
    """
    calibration = Calibration.begin(model, windows)
    scales: dict[int, dict[str, Scale]] = {}
    for index, layer in enumerate(decoder_layers(model)):
        linears = fused_linears(layer)
        folds = folds_of(set(linears) | {name for name, _ in layer.named_children()})
        if not folds:
            raise ProfilingError(
                f"{type(layer).__name__} has no linear whose inputs could be scaled in what produces them; known "
                f"are {sorted(_PARTS)}. Serve this model without a profile."
            )
        watched = {fold.consumer: linears[fold.consumer][0] for fold in folds}
        inputs = calibration.pass_through(layer, watched)
        scales[index] = {
            name: choose_scale(inputs[name], torch.cat([part.weight.detach() for part in linears[name]]))
            for name in watched
        }
        on_layer(index, scales[index])
    return scales
