"""Kernels and checkpoints that the settings name. What is wrong with one of them is said before weights load.

What only a rank can find out it says later: that a kernel does not pass its test, that tensors do not fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from morphserve.config import MorphServeConfig
from morphserve.errors import ConfigError
from morphserve.hub import find_files
from quant_layers import Checkpoint, QuantError, by_preference

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def check_sources(config: MorphServeConfig, model: ModelConfig, device: str) -> None:
    """Refuse kernels that there are none of, and checkpoints that cannot be read or are of another model.

    Args:
        config: the settings, of whose formats all are known.
        model: that is served.
        device: its type.

    Raises:
        ConfigError: value, limit, remedy.
    """
    for fmt, name in config.kernels.items():
        known = [make.name for make in by_preference(fmt, device) if not make.runs_on or device in make.runs_on]
        if name not in known:
            raise ConfigError(
                f"kernels: {fmt}: {name!r} is none of the kernels that run {fmt} on device {device!r}: "
                f"{', '.join(known) or 'there are none'}. Name one of them, or leave it out: the first that passes its "
                "self-test runs it then."
            )
    for fmt, source in config.variants.items():
        directory = find_files(source, f"variants: {fmt}")
        try:
            Checkpoint.open(directory).check_shape(model.hf_text_config.to_dict())
        except QuantError as e:
            raise ConfigError(f"variants: {fmt}: {e}") from e
