"""Which level to serve at: pure questions on counters. Standard library and pydantic only."""

from __future__ import annotations

from policies.config import PolicyConfig, StaticConfig, ThresholdConfig
from policies.levels import deepest_level_within, resolve_level
from policies.static import StaticPolicy
from policies.threshold import ThresholdPolicy
from policies.types import BASE_FORMAT, Decision, Ladder, MorphLevel, Policy, Signals

__all__ = [
    "BASE_FORMAT",
    "Decision",
    "Ladder",
    "MorphLevel",
    "Policy",
    "PolicyConfig",
    "Signals",
    "StaticConfig",
    "StaticPolicy",
    "ThresholdConfig",
    "ThresholdPolicy",
    "build_policy",
    "deepest_level_within",
    "resolve_level",
]


def build_policy(config: StaticConfig | ThresholdConfig, ladder: Ladder) -> Policy:
    """The policy that the `policy:` section asks for, on this ladder.

    Raises:
        ValueError: the section names a level that the ladder does not have, or its thresholds
            contradict each other; the message says value, limit and remedy.
    """
    if isinstance(config, StaticConfig):
        return StaticPolicy(config, ladder)
    return ThresholdPolicy(config, ladder)
