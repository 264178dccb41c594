"""The ladder of the profile that the settings name, for who serves it and for who simulates that."""

from __future__ import annotations

from morphserve.config import MorphServeConfig
from morphserve.control import ProfileLadder
from morphserve.errors import ConfigError


def read_ladder(config: MorphServeConfig) -> ProfileLadder | None:
    """Read what the configured profile says about the ladder; None without a profile.

    Raises:
        ConfigError: the profile is missing or damaged.
    """
    if config.profile is None:
        return None
    from quant_layers import ProfileError, read_profile  # torch: only where there is a profile

    try:
        profile = read_profile(config.profile, with_scales=False)
    except ProfileError as e:
        raise ConfigError(str(e)) from e
    levels = tuple(level.layers for level in profile.ladder)
    return ProfileLadder(profile.order, levels, tuple(level.kl for level in profile.ladder))
