"""The settings: `sections` of the YAML, `reading` them strictly, and the `default_ladder` that nobody wrote down."""

from __future__ import annotations

from morphserve.config.default_ladder import (
    DEFAULT_FORMATS,
    Device,
    Settled,
    default_steps,
    inside_out,
    max_kl,
    settle,
)
from morphserve.config.reading import load_config, parse_config, parse_policy, problem_lines
from morphserve.config.sections import (
    AdminConfig,
    KVConfig,
    LadderConfig,
    LadderStep,
    MorphServeConfig,
    TransitionConfig,
    check_formats,
    step_times_file,
)

__all__ = [
    "AdminConfig",
    "DEFAULT_FORMATS",
    "Device",
    "KVConfig",
    "LadderConfig",
    "LadderStep",
    "MorphServeConfig",
    "Settled",
    "TransitionConfig",
    "check_formats",
    "default_steps",
    "inside_out",
    "load_config",
    "max_kl",
    "parse_config",
    "parse_policy",
    "problem_lines",
    "settle",
    "step_times_file",
]
