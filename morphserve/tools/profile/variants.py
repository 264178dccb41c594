"""What a format makes of a decoder layer, as numbers: the serving kernels' arithmetic in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from morphserve.tools.profile.model import LayerTensors, StreamedModel
from quant_layers import FORMATS, apply_scales, folds_of, half_of

# What vLLM fuses into one linear, by the names in transformers.
PARTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "self_attn.qkv_proj": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.qkv_proj",)),
    "mlp.gate_up_proj": (("mlp.gate_proj", "mlp.up_proj"), ("mlp.gate_up_proj",)),
    "mlp.down_proj": (("mlp.down_proj",),),
    "self_attn.o_proj": (("self_attn.o_proj",),),
}
_TINY = 1e-6
Arguments = Mapping[str, Any]  # what else a layer's forward takes


def parts_of(names: set[str]) -> dict[str, tuple[str, ...]]:
    """Fused linear |-> the linears of a transformers layer that vLLM makes it of."""
    found = {}
    for fused, alternatives in PARTS.items():
        for parts in alternatives:
            if set(parts) <= names:
                found[fused] = parts
                break
    return found


def round_activations(x: Tensor) -> Tensor:
    """Round to int8 with one step a token, as the W8A8 and W4A8 kernels do."""
    step = x.abs().amax(dim=-1, keepdim=True).clamp_min(_TINY) / 127
    return (x / step).round_() * step


@dataclass(slots=True)
class RoundToNearest:
    """A format made here, W8 with the profile's input scales where it has some."""

    format: str
    scales: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)  # layer |-> fused linear |-> [K]
    half: str = ""  # empty = the whole layer
    _cached: tuple[int, LayerTensors] | None = None

    def run(self, model: StreamedModel, index: int, base: LayerTensors, hidden: Tensor, arguments: Arguments) -> Tensor:
        """Hidden states behind layer `index` in this format, from hidden states in front of it."""
        if self._cached is None or self._cached[0] != index:  # once a layer, not once a window
            self._cached = index, self._tensors(index, base, self._linears(model, index), _norm_offset(model, index))
        rounded = self._linears(model, index) if FORMATS[self.format].int8_activations else set()
        with model.rounding_inputs(index, round_activations, rounded):
            return model.run(index, self._cached[1], hidden, arguments)

    def _linears(self, model: StreamedModel, index: int) -> set[str]:
        return {name for name in model.linears(index) if self.half in ("", half_of(name))}

    def _tensors(self, index: int, base: LayerTensors, linears: set[str], offset: float) -> LayerTensors:
        tensors = dict(base)
        canonical = FORMATS[self.format]
        if canonical.per_row and canonical.int8_activations:
            fused = parts_of(linears)
            scales = {name: scale for name, scale in self.scales.get(index, {}).items() if name in fused}
            tensors |= _scaled(base, fused, scales, offset)
        for name in linears:
            tensors[f"{name}.weight"] = canonical.of(tensors[f"{name}.weight"]).dequantize()
        return tensors


def _scaled(
    base: LayerTensors, parts: Mapping[str, tuple[str, ...]], scales: Mapping[str, Tensor], offset: float
) -> LayerTensors:
    """Return the tensors that folding `scales` in changes, by their names in transformers."""
    fused = {name: torch.cat([base[f"{part}.weight"] for part in names]) for name, names in parts.items()}
    norms = {
        name.removesuffix(".weight"): tensor for name, tensor in base.items() if tensor.dim() == 1 and "norm" in name
    }
    folds = folds_of(set(fused) | set(norms))
    used = {fold.producer: norms[fold.producer] for fold in folds if fold.how == "norm"}
    weights, changed = apply_scales(fused, used, offset, scales)
    new = {f"{name}.weight": tensor for name, tensor in changed.items()}
    for name, names in parts.items():
        sizes = [len(base[f"{part}.weight"]) for part in names]
        new |= {f"{part}.weight": rows for part, rows in zip(names, weights[name].split(sizes), strict=True)}
    return new


def _norm_offset(model: StreamedModel, index: int) -> float:
    """Gemma's norms multiply by 1 + weight."""
    return 1.0 if "Gemma" in type(model.layers[index]).__name__ else 0.0
