"""What is done to a rank's weights before a kernel packs them: nothing, or what the profile says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase

from morphserve.errors import ConfigError
from quant_layers import (
    SOURCE_MARK,
    Kernel,
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
PackedLayer = dict[str, dict[str, torch.Tensor]]  # name inside the layer |-> tensor name |-> tensor
Norms = dict[int, dict[str, torch.nn.Module]]  # decoder layer id |-> name inside the layer |-> norm


class Plain:
    """Packs weights as they are."""

    group_sizes: tuple[int, ...] = ()  # that weights come in which are not rounded here; see `quant_layers.choose`

    def layout(self, kernel: Kernel) -> str:
        """Return what the store files a layer under: the kernel, and what was done to the weights before."""
        return kernel.name

    def pack(self, layer: int, kernel: Kernel, weights: Mapping[str, torch.Tensor]) -> PackedLayer:
        """Pack a layer's linears, and everything else of it that differs, as the store keeps them."""
        return {name: kernel.pack(weight) for name, weight in weights.items()}

    def tensor_slots(self) -> dict[int, dict[str, TensorSlot]]:
        """Return what else of a layer a variant may bring. Ask when the model has its final tensors."""
        return {}


class Smoother(Plain):
    """Scales the linears and norms of this rank's layers as the profile says, sliced as vLLM sliced the weights."""

    def __init__(self, profile: Profile, linears: Mapping[int, Mapping[str, LinearBase]], norms: Norms) -> None:
        """Use `open`."""
        self._digest = profile.digest
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
            profile.check_base(base_fingerprint(_of_all_stages(weights)), type(model).__name__)
        except ProfileError as e:
            raise ConfigError(str(e)) from e
        return cls(profile, linears, norms)

    def layout(self, kernel: Kernel) -> str:
        name = super().layout(kernel)
        return f"{name}{SOURCE_MARK}{self._digest[:12]}" if _gains(kernel) else name

    def pack(self, layer: int, kernel: Kernel, weights: Mapping[str, torch.Tensor]) -> PackedLayer:
        """Fold the profile's scales into a layer, and pack it.

        Raises:
            ConfigError: the profile's scales do not fit the layer.
        """
        if not _gains(kernel):
            return super().pack(layer, kernel, weights)
        scales = {
            name: _slice(scale, self._linears[layer][name]) for name, scale in self._scales.get(layer, {}).items()
        }
        norms = self._norms[layer]
        # Gemma's norms multiply by 1 + weight (vllm/model_executor/layers/layernorm.py, GemmaRMSNorm).
        offset = 1.0 if any(type(norm).__name__ == "GemmaRMSNorm" for norm in norms.values()) else 0.0
        try:
            scaled, changed = apply_scales(weights, {n: m.weight.data for n, m in norms.items()}, offset, scales)
        except QuantError as e:
            raise ConfigError(f"profile, layer {layer}: {e}. Make it again with `morphserve profile`.") from e
        return super().pack(layer, kernel, scaled) | {name: {"weight": norm} for name, norm in changed.items()}

    def tensor_slots(self) -> dict[int, dict[str, TensorSlot]]:
        return {
            layer: {name: TensorSlot(norm.weight.data) for name, norm in norms.items()}
            for layer, norms in self._norms.items()
        }


def _of_all_stages(norms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gather the norms of all stages, each of which has its own only. All come here at once, while they load."""
    stages = get_pp_group()
    if stages.world_size == 1:
        return norms
    found: list[Any] = [None] * stages.world_size
    torch.distributed.all_gather_object(found, norms, group=stages.cpu_group)
    return {name: tensor for own in found for name, tensor in own.items()}


def _gains(kernel: Kernel) -> bool:
    """Return whether smoothing helps: not 4 bits, rounded group by group, which scales of whole rows do not mend."""
    return kernel.format == "w8" and kernel.quantizes_activations


def _slice(scale: torch.Tensor, linear: LinearBase) -> torch.Tensor:
    """Return this rank's share of the input channels: only row-parallel linears have less than all."""
    size = linear.input_size_per_partition
    return scale if len(scale) == size else scale[linear.tp_rank * size : (linear.tp_rank + 1) * size]
