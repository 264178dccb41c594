"""One level, for ever: the baselines that a morphing server is compared with."""

from __future__ import annotations

from policies.config import StaticConfig
from policies.levels import resolve_level
from policies.types import Decision, Ladder, Signals


class StaticPolicy:
    """A policy that goes to one level at start and stays there, whatever the load does."""

    predictions = None

    def __init__(self, config: StaticConfig, ladder: Ladder) -> None:
        """Resolve the level once.

        Raises:
            ValueError: the ladder has no such level.
        """
        level = resolve_level(ladder, config.level)
        self.max_level = len(ladder) - 1  # it has no bound of its own: the ladder has the quality's
        self._decision = Decision(level, f"static level {level}", is_final=True)

    def decide(self, signals: Signals) -> Decision:
        """Return the one level, always."""
        return self._decision
