"""What the settings say about each format: which kernel runs it, and what its layers are made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.linear import LinearBase

from morphserve.config import MorphServeConfig
from morphserve.control import optional_formats
from morphserve.errors import ConfigError
from morphserve.integration.worker.base_linear import applied_bias
from morphserve.integration.worker.import_source import Importer
from morphserve.integration.worker.profile_source import Plain, Smoother
from morphserve.profile_ladder import read_ladder
from policies import BASE_FORMAT
from quant_layers import Kernel, KernelError, choose, split_format

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def formats_of_halves(layer_formats: Iterable[str]) -> list[str]:
    """Return every format that some half of a layer gets, full precision left out."""
    halves = (half for fmt in layer_formats for half in split_format(fmt))
    return [fmt for fmt in dict.fromkeys(halves) if fmt != BASE_FORMAT]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a kernel must take on one rank, and where.

    Attributes:
        dtype: of activations.
        device: type of torch.
        shapes: [N, K] of the weights; none where every kernel of the device takes any.
        group_sizes: by format, the groups that a checkpoint's weights come in.
    """

    dtype: torch.dtype
    device: str = "cpu"
    shapes: Sequence[tuple[int, int]] = ()
    group_sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """By format, the kernel that runs it here, or why none does."""

    kernels: dict[str, Kernel]
    left_out: dict[str, str]


def choose_kernels(config: MorphServeConfig, formats: Sequence[str], needs: Needs) -> Choice:
    """Choose the first kernel of each format that proves itself here, or the one that is asked for.

    A format is left out where the ladder may do without it, and where nothing else of the settings names it.

    Args:
        config: says which kernels are asked for, and which formats are optional.
        formats: to be run, full precision left out.
        needs: of this rank.

    Raises:
        ConfigError: a format that the settings name cannot run here, or no format can.
    """
    optional = optional_formats(config.ladder, read_ladder(config)) - {*config.kernels, *config.variants}
    choice = Choice({}, {})
    for fmt in formats:
        try:
            choice.kernels[fmt] = choose(
                fmt, needs.dtype, config.kernels.get(fmt), needs.device, needs.shapes, needs.group_sizes.get(fmt, ())
            )
        except KernelError as e:
            if fmt not in optional:
                raise ConfigError(f"{e} Take that format out of ladder.steps.") from e
            choice.left_out[fmt] = str(e)
    if formats and not choice.kernels:
        raise ConfigError(
            f"no format of the ladder can run here: {'; '.join(choice.left_out.values())}. `morphserve "
            "check` says for which dtypes one can: serve with such a --dtype, or without --plugin morphserve."
        )
    return choice


def open_source(
    config: MorphServeConfig,
    fmt: str,
    model: torch.nn.Module,
    linears: Mapping[int, Mapping[str, LinearBase]],
    model_config: ModelConfig,
) -> Plain:
    """Open what the layers of a format come from: a checkpoint, the profile, or the weights as they are.

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
