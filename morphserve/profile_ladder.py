"""The ladder of the profile that the settings name, for who serves it and for who simulates that."""

from __future__ import annotations

from morphserve.config import MorphServeConfig, max_kl
from morphserve.control import ProfileLadder
from morphserve.errors import ConfigError


def read_ladder(config: MorphServeConfig) -> ProfileLadder | None:
    """Read what the configured profile says about the ladder, as far as it may cost; None without a profile.

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
    cap = max_kl(config)
    kept = [level for index, level in enumerate(profile.ladder) if index == 0 or level.kl <= cap]
    left_out = tuple(level.kl for level in profile.ladder[1:] if level.kl > cap)
    return ProfileLadder(
        profile.order, tuple(level.layers for level in kept), tuple(level.kl for level in kept), left_out
    )
