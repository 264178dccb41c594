"""Where the settings live between processes: `additional_config["morphserve"]`.

From the command line only the path of the YAML travels: `additional_config` enters vLLM's compile-cache
hash, and a changed threshold must not recompile the model.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphserve.config import Device, MorphServeConfig, Settled, load_config, max_kl, parse_config, settle
from morphserve.control import DEFAULT_FORMATS, without_formats
from morphserve.profile_ladder import read_ladder
from policies import bits_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from morphserve.prepared import Prepared

KEY = "morphserve"
CONFIG_FILE = "config_file"
# Attributes of VllmConfig, none of its fields: the settings, and what prepared.py has found for the engine.
STATED, FOUND = "morphserve_settings", "morphserve_prepared"


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


def settings_of(vllm_config: VllmConfig | None) -> MorphServeConfig | None:
    """Return the settings as they were when the engine's config was made, or None when MorphServe was not asked for.

    A file that is edited while weights load would else be one thing to a rank, and another to the engine.

    Raises:
        ConfigError: see `load_config`; of a config that was made elsewhere.
    """
    stated: MorphServeConfig | None = getattr(vllm_config, STATED, None)
    return read_settings(getattr(vllm_config, "additional_config", None)) if stated is None else stated


def for_this_device(config: MorphServeConfig, vllm_config: VllmConfig) -> MorphServeConfig:
    """Return the settings with what was prepared, and the ladder that they mean here, see `settle`."""
    return _settle(with_prepared(config, vllm_config), vllm_config).config


def with_prepared(config: MorphServeConfig, vllm_config: VllmConfig) -> MorphServeConfig:
    """Return the settings with the profile and the step times that were found for this engine, if any were."""
    found: Prepared | None = getattr(vllm_config, FOUND, None)
    return config if found is None else found.fill(config)


def ladder_note(config: MorphServeConfig, vllm_config: VllmConfig) -> tuple[int, str]:
    """Return what a user should know of levels that he might expect and that are not there, and at which log level.

    Args:
        config: the settings as written.
        vllm_config: vLLM's.

    Returns:
        A level of `logging`, and one line; an empty one where nothing is left out.
    """
    config = with_prepared(config, vllm_config)
    settled, profile = _settle(config, vllm_config), read_ladder(config)
    if settled.note or profile is None or not profile.left_out or isinstance(settled.config.ladder.steps, list):
        return (logging.WARNING if settled.is_warning else logging.INFO), settled.note
    dearest, alone = max(profile.left_out), not profile.levels[1:]
    note = (
        f"{len(profile.left_out)} levels of the profile are left out, of {min(profile.left_out):.4g} to {dearest:.4g} "
        f"nats per token: quality.max_kl_per_token is {max_kl(config):g}, raise it to have them"
    )
    only = "; level 0 is the only level, so nothing will ever change" if alone else ""
    return (logging.WARNING if alone else logging.INFO), note + only


def _settle(config: MorphServeConfig, vllm_config: VllmConfig) -> Settled:
    """Write down the ladder's steps; on a GPU few levels a format.

    Each level has CUDA graphs there, which cost memory and time at start. Fewer where vLLM's custom all-reduce has no
    room for the graphs of more.
    """
    from morphserve.integration.start.device import default_formats
    from morphserve.integration.start.device_budget import levels_of_a_format
    from morphserve.integration.start.device_checks import has_room_for_graph_sets

    model_config = vllm_config.model_config
    num_layers, formats = model_config.get_total_num_hidden_layers(), default_formats()
    device = Device(num_layers, base_bits=base_bits(model_config))
    profile = read_ladder(config)
    levels_are_known = profile is not None and profile.has_levels
    if formats:
        device = replace(device, formats=formats, layers_per_level=num_layers)
        num_steps = len(settle(config, device, levels_are_known).config.ladder.steps or ())
        counts = range(levels_of_a_format(num_layers), 1, -1)
        count = next((n for n in counts if has_room_for_graph_sets(vllm_config, 1 + n * num_steps)), 1)
        device = replace(device, layers_per_level=-(-num_layers // count))
    return settle(config, device, levels_are_known)


def base_bits(model_config: Any) -> int:
    """Return how many bits vLLM's model has in its own weights."""
    return 8 if model_config.quantization else 8 * int(model_config.dtype.itemsize)


def formats_over(model_config: Any) -> tuple[str, ...]:
    """Return the formats that a default ladder may have here over vLLM's model: those that free something."""
    from morphserve.integration.start.device import default_formats

    own = base_bits(model_config)
    return tuple(fmt for fmt in default_formats() or DEFAULT_FORMATS if bits_of(fmt) < own)


def served_ladder(config: MorphServeConfig, left_out: Collection[str]) -> MorphServeConfig:
    """Return the settings with the formats that run here."""
    return config.model_copy(update={"ladder": without_formats(config.ladder, left_out)})


def config_file(additional_config: Any) -> Path | None:
    """Return the YAML that the settings are in; None when they were given as a mapping, or not at all."""
    raw = additional_config.get(KEY) if is_active(additional_config) else None
    return Path(raw[CONFIG_FILE]) if isinstance(raw, dict) and set(raw) == {CONFIG_FILE} else None
