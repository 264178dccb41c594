"""The settings of kind slo with what the user left out filled in, and what levels cost."""

from __future__ import annotations

from dataclasses import dataclass

from policies.config import SloConfig
from policies.levels import max_level_of
from policies.types import Ladder

_GUESSED_KL = 0.03  # nats per token of the deepest level, where nobody measured them: as 8 bits on all layers cost


@dataclass(frozen=True, slots=True)
class SloTargets:
    """SloConfig with every field filled in."""

    target: float
    horizon_s: float
    dwell_s: float
    nats_per_saved_request: float
    max_level: int


_PRESETS: dict[str, tuple[float, float, float, float]] = {  # target, horizon_s, dwell_s, nats_per_saved_request
    "accuracy": (0.05, 2.0, 0.5, 100.0),
    "default": (0.01, 3.0, 1.0, 300.0),
    "performance": (0.002, 6.0, 3.0, 1000.0),
}


def fill_in(config: SloConfig, ladder: Ladder) -> SloTargets:
    """Fill in what the user left out from the mode's presets.

    Raises:
        ValueError: `max_level` is not on the ladder.
    """
    target, horizon_s, dwell_s, nats = _PRESETS[config.mode]
    return SloTargets(
        target if config.target is None else config.target,
        horizon_s if config.horizon_s is None else config.horizon_s,
        dwell_s if config.dwell_s is None else config.dwell_s,
        nats if config.nats_per_saved_request is None else config.nats_per_saved_request,
        max_level_of(config, ladder),
    )


def costs_of(ladder: Ladder) -> list[float]:
    """Return nats per token by level; where nobody measured them, deeper is worse."""
    if all(level.expected_kl is not None or level.index == 0 for level in ladder):
        return [level.expected_kl or 0.0 for level in ladder]
    return [_GUESSED_KL * level.index / (len(ladder) - 1) for level in ladder]
