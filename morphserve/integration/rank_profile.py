"""The profile's scales on one rank: sliced as vLLM sliced the weights, folded into what this layer has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from vllm.model_executor.layers.linear import LinearBase

from morphserve.errors import ConfigError
from quant_layers import (
    Profile,
    ProfileError,
    QuantError,
    TensorSlot,
    apply_scales,
    base_fingerprint,
    folds_of,
    read_profile,
)

_NORM = re.compile(r"(?:^|\.)layers\.((\d+)\.(.+))\.weight$")
Norms = dict[int, dict[str, torch.nn.Module]]  # decoder layer id |-> name inside the layer |-> norm


class Smoother:
    """Scales the linears and norms of this rank's layers as the profile says."""

    def __init__(self, profile: Profile, linears: Mapping[int, Mapping[str, LinearBase]], norms: Norms) -> None:
        """Use `open`."""
        self.digest = profile.digest
        self._scales = profile.scales
        self._linears = linears
        self._norms: Norms = {}
        for layer in linears:
            names = set(linears[layer]) | set(norms.get(layer, {}))
            folded = {fold.producer for fold in folds_of(names) if fold.how == "norm"}
            self._norms[layer] = {name: norms[layer][name] for name in sorted(folded)}

    @classmethod
    def open(
        cls, directory: Path, model: torch.nn.Module, linears: Mapping[int, Mapping[str, LinearBase]]
    ) -> Smoother:
        """Read the profile and check that it was made for this model.

        Raises:
            ConfigError: damaged, or made for other weights.
        """
        norms: Norms = {}
        weights: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            match = _NORM.search(name)
            if match and parameter.dim() == 1 and "norm" in match[3]:
                weights[f"{match[1]}.weight"] = parameter.data
                norms.setdefault(int(match[2]), {})[match[3]] = model.get_submodule(name.rpartition(".")[0])
        try:
            profile = read_profile(directory)
            profile.check_base(base_fingerprint(weights), type(model).__name__)
        except ProfileError as e:
            raise ConfigError(str(e)) from e
        return cls(profile, linears, norms)

    def smooth(
        self, layer: int, weights: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Weights and norms of a layer with the scales folded in.

        Raises:
            ConfigError: the profile's scales do not fit the layer.
        """
        scales = {
            name: _slice(scale, self._linears[layer][name]) for name, scale in self._scales.get(layer, {}).items()
        }
        norms = self._norms[layer]
        # Gemma's norms multiply by 1 + weight (vllm/model_executor/layers/layernorm.py, GemmaRMSNorm).
        offset = 1.0 if any(type(norm).__name__ == "GemmaRMSNorm" for norm in norms.values()) else 0.0
        try:
            return apply_scales(weights, {n: m.weight.data for n, m in norms.items()}, offset, scales)
        except QuantError as e:
            raise ConfigError(f"profile, layer {layer}: {e}. Make it again with scripts/profile_layers.py.") from e

    def norm_bytes(self, layer: int) -> int:
        """Of the norms that a smoothed layer brings."""
        return sum(norm.weight.nbytes for norm in self._norms[layer].values())

    def tensor_slots(self) -> dict[int, dict[str, TensorSlot]]:
        """The live norms, to be made when the model has its final tensors."""
        return {
            layer: {name: TensorSlot(norm.weight.data) for name, norm in norms.items()}
            for layer, norms in self._norms.items()
        }


def _slice(scale: torch.Tensor, linear: LinearBase) -> torch.Tensor:
    """This rank's share of the input channels: only row-parallel linears have less than all."""
    size = linear.input_size_per_partition
    return scale if len(scale) == size else scale[linear.tp_rank * size : (linear.tp_rank + 1) * size]
