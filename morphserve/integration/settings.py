"""Where the settings live between processes: `additional_config["morphserve"]`.

From the command line only the path of the YAML travels: `additional_config` enters vLLM's compile-cache
hash, and a changed threshold must not recompile the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from morphserve.config import MorphServeConfig, load_config, parse_config

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


def config_file(additional_config: Any) -> Path | None:
    """The YAML that the settings are in; None when they were given as a mapping, or not at all."""
    raw = additional_config.get(KEY) if is_active(additional_config) else None
    return Path(raw[CONFIG_FILE]) if isinstance(raw, dict) and set(raw) == {CONFIG_FILE} else None
