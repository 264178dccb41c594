"""What the settings say about each format: which kernel runs it, and what its layers are made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase

from morphserve.config import MorphServeConfig
from morphserve.errors import ConfigError
from morphserve.integration.rank_base import applied_bias
from morphserve.integration.rank_import import Importer
from morphserve.integration.rank_profile import Plain, Smoother
from policies.types import BASE_FORMAT
from quant_layers import Kernel, KernelError, choose, split_format


def formats_of_halves(layer_formats: Iterable[str]) -> list[str]:
    """Every format that some half of a layer gets, full precision left out."""
    halves = (half for fmt in layer_formats for half in split_format(fmt))
    return [fmt for fmt in dict.fromkeys(halves) if fmt != BASE_FORMAT]


def choose_kernels(
    config: MorphServeConfig,
    formats: Sequence[str],
    dtype: torch.dtype,
    device: str,
    shapes: Sequence[tuple[int, int]] = (),
    recipes: Mapping[str, Plain] = MappingProxyType({}),
) -> dict[str, Kernel]:
    """By format, the first kernel that proves itself on this type of device, or the one that is asked for.

    Args:
        config: names kernels that are asked for.
        formats: to be run.
        dtype: of activations.
        device: type of torch.
        shapes: [N, K] of the weights that the kernel must take.
        recipes: by format, where weights come from: the kernel must take the groups that they come in.

    Raises:
        ConfigError: a format that cannot run here.
    """
    try:
        groups = {fmt: recipe.group_sizes for fmt, recipe in recipes.items()}
        return {
            fmt: choose(fmt, dtype, config.kernels.get(fmt), device, shapes, groups.get(fmt, ())) for fmt in formats
        }
    except KernelError as e:
        raise ConfigError(f"{e} Take that format out of ladder.steps.") from e


def open_recipe(
    config: MorphServeConfig,
    fmt: str,
    model: torch.nn.Module,
    linears: Mapping[int, Mapping[str, LinearBase]],
    model_config: Any,
) -> Plain:
    """Where the layers of a format come from: a checkpoint, the profile, or the weights as they are.

    Raises:
        ConfigError: checkpoint or profile do not fit the model.
    """
    source = config.variants.get(fmt)
    if source is not None:
        biases = {
            f"{layer}.{name}"
            for layer, by_name in linears.items()
            for name, linear in by_name.items()
            if applied_bias(linear) is not None
        }
        return Importer.open(source, model, linears, biases, model_config)
    if config.profile is not None:
        return Smoother.open(config.profile, model, linears)
    return Plain()
