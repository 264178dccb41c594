"""Where the settings live between processes: `additional_config["morphserve"]`.

From the command line only the path of the YAML travels: `additional_config` enters vLLM's compile-cache
hash, and a changed threshold must not recompile the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from morphserve.config import LadderStep, MorphServeConfig, load_config, parse_config
from morphserve.control import without_formats

KEY = "morphserve"
CONFIG_FILE = "config_file"


def is_active(additional_config: Any) -> bool:
    """MorphServe was asked for."""
    return isinstance(additional_config, dict) and KEY in additional_config


def read_settings(additional_config: Any) -> MorphServeConfig | None:
    """The typed config, or None when MorphServe was not asked for.

    Raises:
        ConfigError: see `load_config`.
    """
    if not is_active(additional_config):
        return None
    raw = additional_config[KEY]
    if (file := config_file(additional_config)) is not None:
        return load_config(file)
    return parse_config({} if raw is None else raw, source='additional_config["morphserve"]')


def for_this_device(config: MorphServeConfig, vllm_config: Any) -> MorphServeConfig:
    """With the ladder that an empty `ladder.steps` means here.

    Half the bytes at little cost come before 4 bits: fp8 on a GPU that multiplies it, else int8 weights, where Marlin
    runs. Two levels a format, because each has CUDA graphs of its own, which cost memory and time at start; one where
    vLLM's custom all-reduce has no room for the graphs of more.
    """
    from vllm.platforms import current_platform

    from morphserve.integration.start.device_checks import has_room_for_banks

    ladder = config.ladder
    if not current_platform.is_cuda() or ladder.steps is not None or config.profile is not None:
        return config
    formats = _formats(current_platform.has_device_capability)
    parts = 2 if has_room_for_banks(vllm_config, 1 + 2 * len(formats)) else 1
    per_level = -(-vllm_config.model_config.get_total_num_hidden_layers() // parts)
    steps = [LadderStep(format=fmt, layers_per_level=per_level, optional=True) for fmt in formats]
    return config.model_copy(update={"ladder": ladder.model_copy(update={"steps": steps})})


def served_ladder(config: MorphServeConfig, left_out: Collection[str]) -> MorphServeConfig:
    """The settings with the formats that run here."""
    return config.model_copy(update={"ladder": without_formats(config.ladder, left_out)})


def _formats(reaches: Callable[[int], bool]) -> tuple[str, ...]:
    """Of a GPU that reaches some compute capabilities, for example 89."""
    if reaches(89):
        return ("fp8", "w4")
    return ("w8", "w4") if reaches(75) else ("w4",)


def config_file(additional_config: Any) -> Path | None:
    """The YAML that the settings are in; None when they were given as a mapping, or not at all."""
    raw = additional_config.get(KEY) if is_active(additional_config) else None
    return Path(raw[CONFIG_FILE]) if isinstance(raw, dict) and set(raw) == {CONFIG_FILE} else None
