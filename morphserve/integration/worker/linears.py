"""The decoder linears of a model on one rank, found while their weights can still be read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping

import torch
from vllm.model_executor.layers.linear import LinearBase

from morphserve.errors import ConfigError
from morphserve.integration.worker.base_linear import base_of, method_of
from morphserve.residence import BaseLinear

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
Linears = dict[int, dict[str, LinearBase]]  # decoder layer id |-> name inside the layer |-> linear
Bases = dict[int, dict[str, BaseLinear]]  # the same |-> what it is at level 0


def find_linears(model: torch.nn.Module) -> Linears:
    """Return all linears inside decoder layers of this rank.

    Raises:
        ConfigError: there are none, or the layers do not all have the same ones.
    """
    found: Linears = {}
    for name, module in model.named_modules():
        match = _LAYER.search(name)
        if match and isinstance(module, LinearBase):
            found.setdefault(int(match[1]), {})[match[2]] = module
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no linear under '...layers.<id>.'. MorphServe morphs dense "
            "decoder layers: start without --plugin morphserve for this model."
        )
    names = {tuple(sorted(linears)) for linears in found.values()}
    if len(names) > 1:
        raise ConfigError(
            f"{type(model).__name__}: decoder layers differ in their linears ({sorted(names)}). MorphServe needs "
            "uniform dense layers: start without --plugin morphserve for this model."
        )
    return found


def find_bases(linears: Linears, in_pages: bool) -> Bases:
    """Return what each linear is at level 0. Before vLLM packs the weights.

    Args:
        linears: of this rank.
        in_pages: see `base_of`.

    Raises:
        ConfigError: vLLM runs one in a way that cannot be stored and rebuilt.
    """
    bases: Bases = {}
    for layer, mine in linears.items():
        for name, linear in mine.items():
            base = base_of(linear, in_pages)
            if base is None:
                raise ConfigError(f"layer {layer} {name} runs {method_of(linear)}; {_limit(in_pages)}")
            bases.setdefault(layer, {})[name] = base
    return bases


def _limit(in_pages: bool) -> str:
    if in_pages:
        return (
            "on a GPU level 0 must be bf16 or fp16. Serve such a checkpoint of this model; a quantized one can be a "
            "step of its ladder (`variants: {w4: CHECKPOINT}`)."
        )
    return (
        "level 0 must be bf16 or fp16 weights, or compressed-tensors int8 or float8 with a scale for every row or "
        "matrix. Serve such a checkpoint of this model; one in 4 bits can be a step of its ladder "
        "(`variants: {w4: CHECKPOINT}`)."
    )


def fingerprint(bases: Bases) -> str:
    """Return a digest of the loaded weights: caches are addressed by what the weights ARE, not by their path."""
    digest = hashlib.sha256()
    for layer, linears in sorted(bases.items()):
        for name, base in sorted(linears.items()):
            for tensor_name, tensor in base.tensors().items():
                digest.update(f"{layer}/{name}/{tensor_name}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class Weights(Mapping[str, torch.Tensor]):
    """A layer's weights by name, each made when it is asked for: in fp32 a quantized one is four times as large."""

    def __init__(self, bases: Mapping[str, BaseLinear], on_host: bool) -> None:
        """Read nothing yet. `on_host`: whoever reads them has other tensors there, scales for example."""
        self._bases, self._on_host = bases, on_host

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._bases[name].weight()
        return weight.cpu() if self._on_host else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._bases)

    def __len__(self) -> int:
        return len(self._bases)
