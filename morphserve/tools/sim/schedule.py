"""Levels by time: what a policy wanted in a run, or what a run is to follow in place of a policy."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from morphserve.errors import ConfigError
from policies import Decision, Ladder, Policy, Predictions, Signals


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which level is wanted from when on; the first one also before its time, so that a run begins there.

    Raises:
        ConfigError: nothing is wanted, times do not ascend, or a level is below 0.
    """

    times_s: tuple[float, ...]  # since the start of the workload
    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.times_s or len(self.times_s) != len(self.levels):
            raise ConfigError(
                f"a schedule of {len(self.times_s)} times and {len(self.levels)} levels: give as many, 1 or more."
            )
        if not all(a < b for a, b in pairwise(self.times_s)):
            raise ConfigError(f"times of a schedule are {self.times_s}, must ascend.")
        if min(self.levels) < 0:
            raise ConfigError(f"a schedule's level is {min(self.levels)}, must be 0 or more.")

    @classmethod
    def constant(cls, level: int) -> Schedule:
        """Return one level for ever."""
        return cls((0.0,), (level,))

    def at(self, t_s: float) -> int:
        """Return the level that is wanted then."""
        return self.levels[max(bisect_right(self.times_s, t_s) - 1, 0)]

    def highest(self, start_s: float, end_s: float) -> int:
        """Return the deepest level that is wanted in `[start_s, end_s)`."""
        inside = (level for t, level in zip(self.times_s, self.levels, strict=True) if start_s < t < end_s)
        return max([self.at(start_s), *inside])

    def changed(self, start_s: float, end_s: float, change: Callable[[int], int]) -> Schedule:
        """Return the same with other levels in `[start_s, end_s)`; a start of 0 or less also before it."""
        first = -inf if start_s <= 0 else start_s
        pairs: list[tuple[float, int]] = []
        for t in sorted({-inf, first, end_s, *self.times_s[1:]} - {inf}):
            level = change(self.at(t)) if first <= t < end_s else self.at(t)
            if not pairs or pairs[-1][1] != level:
                pairs.append((t, level))
        later = pairs[1:]
        start = min(0.0, later[0][0] - 1.0) if later else 0.0
        return Schedule((start, *(t for t, _ in later)), tuple(level for _, level in pairs))

    def document(self) -> list[list[float]]:
        """Return pairs of time and level for JSON."""
        return [[round(t, 3), level] for t, level in zip(self.times_s, self.levels, strict=True)]


class Asked:
    """A policy, and what it has answered."""

    def __init__(self, policy: Policy) -> None:
        """Have it asked nothing yet."""
        self._policy = policy
        self._times_s: list[float] = []
        self._levels: list[int] = []

    @property
    def predictions(self) -> Predictions | None:
        """As the policy says."""
        return self._policy.predictions

    @property
    def max_level(self) -> int:
        """As the policy says."""
        return self._policy.max_level

    def decide(self, signals: Signals) -> Decision:
        """Ask the policy."""
        decision = self._policy.decide(signals)
        if not self._levels or self._levels[-1] != decision.level:
            if self._times_s and self._times_s[-1] == signals.now_s:
                self._times_s.pop()
                self._levels.pop()
            self._times_s.append(signals.now_s)
            self._levels.append(decision.level)
        return decision

    @property
    def schedule(self) -> Schedule:
        """The levels that it has wanted so far; level 0 where nobody has asked."""
        return Schedule(tuple(self._times_s) or (0.0,), tuple(self._levels) or (0,))


class SchedulePolicy:
    """A policy that wants what is written down, whatever the load does."""

    predictions = None

    def __init__(self, schedule: Schedule, ladder: Ladder) -> None:
        """Begin before its first time.

        Raises:
            ValueError: the ladder has no such level.
        """
        if (deepest := max(schedule.levels)) >= len(ladder):
            raise ValueError(f"the schedule wants level {deepest}, the ladder has 0 to {len(ladder) - 1}")
        self.max_level = len(ladder) - 1
        self._levels = schedule.levels
        self._next_s = (*schedule.times_s[1:], inf)
        self._index = 0

    def wanted(self, now_s: float) -> int:
        """Return the level that is wanted; time does not go back."""
        while self._next_s[self._index] <= now_s:
            self._index += 1
        return self._levels[self._index]

    def decide(self, signals: Signals) -> Decision:
        """Return what is written down."""
        level = self.wanted(signals.now_s)
        return Decision(level, f"scheduled level {level}", is_final=len(self._levels) == 1)
