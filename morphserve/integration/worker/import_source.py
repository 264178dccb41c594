"""A rank's layers out of somebody's quantized checkpoint, fused and sliced by vLLM's own weight loaders.

Which tensors of a checkpoint end up where in vLLM's model, in which half of which fused linear and in which
tensor-parallel slice, is known to the model's `load_weights`. A quantized weight is three matrices of the shape
of the weight itself (integers, scales, zero points), so the same `load_weights` places each of them: once per
matrix, into stand-ins for the parameters. Nothing here knows the name of a linear.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer
from vllm.model_executor.layers.linear import LinearBase

from morphserve.errors import ConfigError
from morphserve.hub import find_files
from morphserve.integration.worker.profile_source import PackedLayer, Plain
from quant_layers import (
    BIAS,
    SOURCE_MARK,
    Checkpoint,
    CheckpointError,
    ImportedLayer,
    Kernel,
    QuantError,
    QuantW4,
    QuantW8,
    TensorSlot,
    regroup,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_ROUNDING = 2.0**-7  # of a bf16 value; a checkpoint kept in fp16 may have rounded what it did not quantize
_FP16_TINY = 1e-6
Parameters = dict[str, torch.nn.Parameter]  # by full name in vLLM's model


class Importer(Plain):
    """Packs the layers of a checkpoint that was quantized from this model."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: torch.nn.Module,
        linears: Mapping[int, Mapping[str, LinearBase]],
        biases: set[str],
    ) -> None:
        """Use `open`."""
        self._checkpoint = checkpoint
        self._model = model
        self._linears = linears
        self._biases = biases  # "layer.linear" whose forward adds a bias on this rank
        self._digest = checkpoint.digest
        self.group_sizes = checkpoint.scheme.group_sizes
        self._parameters: dict[int, Parameters] = {}
        self._rest: Parameters = {}
        for name, parameter in model.named_parameters():
            match = _LAYER.search(name)
            of_layer = self._parameters.setdefault(int(match[1]), {}) if match else self._rest
            of_layer[name] = parameter

    @classmethod
    def open(
        cls,
        source: str,
        model: torch.nn.Module,
        linears: Mapping[int, Mapping[str, LinearBase]],
        biases: set[str],
        model_config: ModelConfig,
    ) -> Importer:
        """Find the checkpoint and check that it was made from this model.

        Args:
            source: directory or hub name.
            model: vLLM's, with its weights loaded and not yet packed.
            linears: by decoder layer id and name inside the layer.
            biases: "layer.linear" whose forward adds a bias on this rank.
            model_config: vLLM's, of the base model.

        Raises:
            ConfigError: there is none, it is damaged, not supported, or of another model.
        """
        directory = find_files(source, "variants")
        try:
            checkpoint = Checkpoint.open(directory)
            checkpoint.check_shape(model_config.hf_text_config.to_dict())
            if not model_config.skip_tokenizer_init:
                _check_tokenizer(model_config.tokenizer, directory)
            importer = cls(checkpoint, model, linears, biases)
            importer._check_rest()
        except QuantError as e:
            raise ConfigError(f"variants: {e}") from e
        return importer

    def layout(self, kernel: Kernel) -> str:
        return f"{kernel.name}{SOURCE_MARK}{self._digest[:12]}"

    def pack(self, layer: int, kernel: Kernel, weights: Mapping[str, torch.Tensor]) -> PackedLayer:
        """Take a layer from the checkpoint.

        Raises:
            ConfigError: the checkpoint has this layer in a form that cannot be swapped in.
        """
        try:
            imported = self._checkpoint.layer(layer)
            packed = {
                name: kernel.pack_quant(quant) for name, quant in self._quants(layer, imported, weights).items()
            }
            return self._with_others(layer, imported, packed)
        except QuantError as e:
            raise ConfigError(f"variants, layer {layer}: {e}") from e

    def tensor_slots(self) -> dict[int, dict[str, TensorSlot]]:
        return {
            layer: {
                _owner(_inside(name)): TensorSlot(parameter.data)
                for name, parameter in self._parameters[layer].items()
                if parameter.dim() == 1 and name.endswith(".weight") and _owner(_inside(name)) not in linears
            }
            for layer, linears in self._linears.items()
        }

    def _quants(
        self, layer: int, imported: ImportedLayer, weights: Mapping[str, torch.Tensor]
    ) -> dict[str, QuantW4 | QuantW8]:
        """Return the rank's fused and sliced linears, in the canonical form."""
        kinds = {type(quant) for quant in imported.linears.values()}
        if len(kinds) != 1:
            found = "no quantized linear" if not kinds else "linears of 4 and of 8 bits"
            raise CheckpointError(f"{self._checkpoint.directory} has {found} in it; one width a layer can be swapped")
        matrices = {
            "q": {f"{module}.weight": quant.q.float() for module, quant in imported.linears.items()},
            "scale": {f"{module}.weight": _spread(quant.scale, quant) for module, quant in imported.linears.items()},
        }
        if kinds == {QuantW4}:
            matrices["zero"] = {
                f"{module}.weight": _spread(quant.zero, quant)
                for module, quant in imported.linears.items()
                if isinstance(quant, QuantW4)
            }
        targets = {name: p for name, p in self._parameters[layer].items() if name.endswith(".weight") and p.dim() == 2}
        loaded = {what: self._load(targets, tensors.items(), torch.float32) for what, tensors in matrices.items()}
        quants: dict[str, QuantW4 | QuantW8] = {}
        for name in targets:
            linear = _owner(_inside(name))
            if linear not in weights:
                continue
            q, scale = loaded["q"][name], loaded["scale"][name]
            if q.isnan().any():
                share = "all" if q.isnan().all() else "a part"
                raise CheckpointError(
                    f"{self._checkpoint.directory} leaves {share} of {linear} unquantized: a layer is swapped whole. "
                    "Quantize again without modules_to_not_convert inside decoder layers."
                )
            if "zero" in loaded:
                quants[linear] = regroup(q.to(torch.uint8), scale, loaded["zero"][name].to(torch.uint8))
            else:
                quants[linear] = QuantW8(q.to(torch.int8), scale[:, 0].contiguous())
        return quants

    def _with_others(self, layer: int, imported: ImportedLayer, packed: PackedLayer) -> PackedLayer:
        """Return `packed`, and every other tensor of the layer that is not what the base has."""
        targets = {
            name: p
            for name, p in self._parameters[layer].items()
            if _owner(_inside(name)) not in self._linears[layer] or name.endswith(f".{BIAS}")
        }
        has_bias = any(name.endswith(".bias") for name in targets)
        tensors = {
            name: tensor
            for name, tensor in imported.others.items()
            # Some tools write a bias of zeros for every linear, also where the model has none.
            if has_bias or not name.endswith(".bias") or tensor.count_nonzero()
        }
        for name, tensor in self._load(targets, tensors.items(), None).items():
            inside = _inside(name)
            if tensor.numel() == 1 and tensor.isnan():
                continue  # a scale for the KV cache, which a quantized model has room for: no variant must bring it
            if tensor.isnan().any():
                raise CheckpointError(f"{self._checkpoint.directory} lacks {inside}; fetch the checkpoint again")
            if torch.equal(tensor, targets[name].data):
                continue
            owner, part = _owner(inside), inside.rpartition(".")[2]
            if owner in self._linears[layer] and part == BIAS:
                if f"{layer}.{owner}" in self._biases:
                    packed[owner][BIAS] = tensor
            elif part == "weight" and tensor.dim() == 1:
                packed[owner] = {"weight": tensor}
            else:
                raise CheckpointError(
                    f"{self._checkpoint.directory} has another {inside} than the model; what can be swapped besides "
                    "linears are norm weights and biases"
                )
        return packed

    def _check_rest(self) -> None:
        """Compare what is outside the decoder layers: a checkpoint of other weights is caught here."""
        if len(self._linears) and self._checkpoint.num_layers <= max(self._linears):
            raise CheckpointError(
                f"{self._checkpoint.directory} has {self._checkpoint.num_layers} decoder layers, the model has more"
            )
        for name, tensor in self._load(self._rest, self._checkpoint.outside(), None).items():
            base = self._rest[name].data
            known = ~tensor.isnan()  # the vocabulary is padded with rows that no checkpoint has
            if not known.any():
                raise CheckpointError(f"{self._checkpoint.directory} lacks {name}; fetch the checkpoint again")
            off = (tensor - base).abs() > _ROUNDING * base.abs() + _FP16_TINY
            if differing := int((off & known).sum()):
                raise CheckpointError(
                    f"{self._checkpoint.directory} has another {name} than the model ({differing:,} of "
                    f"{base.numel():,} values differ): it was made from other weights. Give the checkpoint that was "
                    "quantized from this model."
                )

    def _load(
        self, targets: Parameters, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None
    ) -> dict[str, torch.Tensor]:
        """Return what `load_weights` writes into stand-ins for `targets`; NaN where nothing was written."""
        with _stand_ins(targets, dtype) as found:
            try:
                self._model.load_weights(iter(tensors))
            except (AssertionError, KeyError, RuntimeError, ValueError) as e:
                raise CheckpointError(
                    f"{self._checkpoint.directory} does not fit {type(self._model).__name__}: {e}; give the checkpoint "
                    "that was quantized from this model"
                ) from e
        return found


def _check_tokenizer(base: str, directory: Path) -> None:
    """Token ids must mean the same. A checkpoint without a tokenizer is taken at its weights' word."""
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        return
    mine, theirs = (AutoTokenizer.from_pretrained(source).get_vocab() for source in (base, directory))
    if mine != theirs:
        differing = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
        raise CheckpointError(
            f"{directory} has another tokenizer than the model: {len(differing):,} tokens differ, the first is "
            f"{differing[0]!r}; give the checkpoint that was quantized from this model"
        )


@contextmanager
def _stand_ins(targets: Parameters, dtype: torch.dtype | None) -> Iterator[dict[str, torch.Tensor]]:
    """NaN-filled tensors in the place of the parameters' own, which come back at the end."""
    own = {name: parameter.data for name, parameter in targets.items()}
    found = {name: torch.full_like(data, torch.nan, dtype=dtype or data.dtype) for name, data in own.items()}
    try:
        for name, parameter in targets.items():
            parameter.data = found[name]
        yield found
    finally:
        for name, parameter in targets.items():
            parameter.data = own[name]


def _spread(per_group: torch.Tensor, quant: QuantW4 | QuantW8) -> torch.Tensor:
    """Scales or zero points, [N, G] or [N], for every weight: fp32 [N, K]."""
    n, k = quant.q.shape
    values = per_group.float().reshape(n, -1)
    return values.repeat_interleave(k // values.shape[1], dim=1)


def _inside(name: str) -> str:
    """Name below the decoder layer."""
    match = _LAYER.search(name)
    assert match is not None
    return match[2]


def _owner(inside: str) -> str:
    return inside.rpartition(".")[0]
