"""Where the settings live between processes: `additional_config["morphserve"]`.

From the command line only the path of the YAML travels: `additional_config` enters vLLM's compile-cache
hash, and a changed threshold must not recompile the model.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphserve.config import LadderStep, MorphServeConfig, load_config, parse_config
from morphserve.control import without_formats

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from morphserve.prepared import Prepared

KEY = "morphserve"
CONFIG_FILE = "config_file"
FOUND = "morphserve_prepared"  # attribute of VllmConfig, none of its fields: what prepared.py has found for the engine


def is_active(additional_config: Any) -> bool:
    """MorphServe was asked for."""
    return isinstance(additional_config, dict) and KEY in additional_config


def read_settings(additional_config: Any) -> MorphServeConfig | None:
    """Return the typed config, or None when MorphServe was not asked for.

    Raises:
        ConfigError: see `load_config`.
    """
    if not is_active(additional_config):
        return None
    raw = additional_config[KEY]
    if (file := config_file(additional_config)) is not None:
        return load_config(file)
    return parse_config({} if raw is None else raw, source='additional_config["morphserve"]')


def for_this_device(config: MorphServeConfig, vllm_config: VllmConfig) -> MorphServeConfig:
    """Return the settings with what was prepared, and the ladder that an empty `ladder.steps` means here.

    Two levels a format, because each has CUDA graphs of its own, which cost memory and time at start; one where vLLM's
    custom all-reduce has no room for the graphs of more.
    """
    from morphserve.integration.start.device import default_formats
    from morphserve.integration.start.device_checks import has_room_for_graph_sets

    found: Prepared | None = getattr(vllm_config, FOUND, None)
    config = config if found is None else found.fill(config)
    ladder, formats = config.ladder, default_formats()
    if not formats or ladder.steps is not None or config.profile is not None:
        return config
    parts = 2 if has_room_for_graph_sets(vllm_config, 1 + 2 * len(formats)) else 1
    per_level = -(-vllm_config.model_config.get_total_num_hidden_layers() // parts)
    steps = [LadderStep(format=fmt, layers_per_level=per_level, optional=True) for fmt in formats]
    return config.model_copy(update={"ladder": ladder.model_copy(update={"steps": steps})})


def served_ladder(config: MorphServeConfig, left_out: Collection[str]) -> MorphServeConfig:
    """Return the settings with the formats that run here."""
    return config.model_copy(update={"ladder": without_formats(config.ladder, left_out)})


def config_file(additional_config: Any) -> Path | None:
    """Return the YAML that the settings are in; None when they were given as a mapping, or not at all."""
    raw = additional_config.get(KEY) if is_active(additional_config) else None
    return Path(raw[CONFIG_FILE]) if isinstance(raw, dict) and set(raw) == {CONFIG_FILE} else None
