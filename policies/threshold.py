"""KV use, queueing delay and preemptions against thresholds, with hysteresis."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from policies.config import ThresholdConfig
from policies.dwell import Dwell
from policies.levels import max_level_of
from policies.types import BASE_FORMAT, Decision, Ladder, Signals

_GROWTH_UNTIL_KNOWN = 1.5  # a request holds its prompt at first; until one has ended, expect it to grow so
_FULL = 0.9  # kv_usage from which a costlier format is worth its price
_SLOWER = 1.1  # times level 0's linears from which a level costs time; less is within what such measurements scatter
_QUIET_S = 1.0  # nothing waited for so long: the load is draining


@dataclass(frozen=True, slots=True)
class Thresholds:
    """ThresholdConfig with every field filled in."""

    degrade_above: float
    queue_delay_s: float
    target_usage: float
    restore_below: float
    restore_after_s: float
    max_level: int


# degrade_above, queue_delay_s, target_usage, restore_below, restore_after_s
_PRESETS: dict[str, tuple[float, float, float, float, float]] = {
    "accuracy": (0.92, 0.50, 0.85, 0.75, 1.0),
    "default": (0.85, 0.20, 0.65, 0.60, 2.0),
    "performance": (0.70, 0.10, 0.35, 0.40, 5.0),
}


def fill_in(config: ThresholdConfig, ladder: Ladder) -> Thresholds:
    """Fill in what the user left out from the mode's presets.

    Raises:
        ValueError: `max_level` is not on the ladder, or the thresholds would make the level swing.
    """
    degrade, delay, target, below, after = _PRESETS[config.mode]
    filled = Thresholds(
        degrade_above=degrade if config.degrade_above is None else config.degrade_above,
        queue_delay_s=delay if config.queue_delay_s is None else config.queue_delay_s,
        target_usage=target if config.target_usage is None else config.target_usage,
        restore_below=below if config.restore_below is None else config.restore_below,
        restore_after_s=after if config.restore_after_s is None else config.restore_after_s,
        max_level=max_level_of(config, ladder),
    )
    for name in ("target_usage", "restore_below"):
        value = getattr(filled, name)
        if value > filled.degrade_above:
            raise ValueError(
                f"policy.{name} {value} is above degrade_above {filled.degrade_above}: the level would "
                f"swing. Set it to {filled.degrade_above} or less."
            )
    return filled


@dataclass(frozen=True, slots=True)
class _Need:
    """The KV blocks that the requests here now will hold when they end."""

    per_request: float
    running: float  # of those that run
    total: float  # with those that wait

    @classmethod
    def of(cls, s: Signals) -> _Need:
        """Estimate from what has ended, and from what is held as long as nothing has."""
        held = s.used_kv_blocks / s.num_running if s.num_running > 0 else 0.0
        known = s.blocks_per_request > 0
        per_request = max(s.blocks_per_request, held) if known else held * _GROWTH_UNTIL_KNOWN
        running = max(float(s.used_kv_blocks), s.num_running * per_request)
        return cls(per_request, running, running + s.num_waiting * per_request)


@dataclass(frozen=True, slots=True)
class Rest:
    """Where to rest instead of at a slow level, with so many sequences in a step."""

    num_seqs: int
    at: tuple[int, ...]  # by level, the deepest one up to it whose steps are as fast as level 0's
    ends: frozenset[int]  # of these, the ones that slow levels come behind


class ThresholdPolicy:
    """A policy of thresholds: down as soon as KV binds, as deep as the need asks; up after a dwell without pressure.

    The need: blocks that the requests here now will hold when they end, since requests grow as they
    decode. Degrade when the KV cache that we have (or are heading for) does not hold it, when
    requests were preempted, or when one waits too long while KV is what binds. Restore to the
    shallowest level that would have held the need, at `restore_below`, throughout the dwell. Being
    wrong (degrading again soon after a restore) doubles the dwell; quiet time halves it again.

    A level whose steps are slower than level 0's buys blocks with time per token: while blocks are left, the policy
    stays at the deepest level above it that is not slower with as many sequences as run now.
    """

    predictions = None

    def __init__(self, config: ThresholdConfig, ladder: Ladder) -> None:
        """Fix the thresholds and the ladder.

        Raises:
            ValueError: see `fill_in`.
        """
        self.thresholds = fill_in(config, ladder)
        self.max_level = self.thresholds.max_level
        self._usable = tuple(level.num_kv_blocks - 1 for level in ladder[: self.max_level + 1])
        most = self._usable[-1]
        self._deepest_useful = bisect_left(self._usable, most)  # deeper ones give no more blocks
        # `performance` goes as deep as the need asks at once; the others take a costlier format only
        # when the cheaper ones, on all their layers, do not hold the need.
        self._tier_ends = () if config.mode == "performance" else tier_ends(ladder[: len(self._usable)])
        self._rests = rests(ladder[: len(self._usable)])
        self._batches = [row.num_seqs for row in self._rests]
        self._leave_tier_below = (self.thresholds.restore_below + self.thresholds.degrade_above) / 2
        self.dwell = Dwell(self.thresholds.restore_after_s)
        self._fits_since: list[float | None] = [None] * len(ladder)  # by level; None = does not fit now
        self._last_preemptions: int | None = None
        self._last_waiting_s = float("-inf")
        self._last = Decision(0, "start at full precision")

    def decide(self, signals: Signals) -> Decision:
        """Return the level to serve at now. O(levels) at most."""
        s = signals
        heading = s.target_level
        if self._last_preemptions is None and heading > 0:  # it replaces another policy, at the level that one left
            self._last = Decision(heading, f"hold level {heading}")
        preempted = self._last_preemptions is not None and s.preemptions > self._last_preemptions
        self._last_preemptions = s.preemptions
        if s.num_waiting > 0:
            self._last_waiting_s = s.now_s
        need = _Need.of(s)
        usable = self._usable_at(s)

        pressure = self._pressure(s, usable, need, preempted)
        # The row of the next larger batch that was measured.
        rest = self._rests[min(bisect_left(self._batches, s.num_running), len(self._rests) - 1)]
        self._note_fits(s, need.total, preempted, rest)
        if pressure is not None:
            why, is_event = pressure
            level = self._unless_slow(self._level_for(need.total, s.used_kv_blocks), s.used_kv_blocks, rest)
            if is_event:  # seen, not predicted: whatever the need says, one level more at least
                level = max(level, self._next_useful(heading))
            if level > heading:
                return self._degrade(s.now_s, level, f"{why}, need {need.total:.0f} of {usable} blocks")
        if heading > 0 and pressure is None:
            level = self._shallowest_rested(s.now_s)
            if level < heading:
                return self._restore(s.now_s, level, need.total)
        return self._stay(heading)

    def _usable_at(self, s: Signals) -> int:
        """Return the blocks for requests at the level we are heading for (fenced ones are as good as gone)."""
        if s.target_level == s.level:
            return s.num_kv_blocks - 1
        heading = self._usable[min(s.target_level, len(self._usable) - 1)]
        return heading if s.target_level > s.level else min(heading, s.num_kv_blocks - 1)

    def _pressure(self, s: Signals, usable: int, need: _Need, preempted: bool) -> tuple[str, bool] | None:
        """Return why KV binds, and whether that was seen (True) or is predicted (False); None = it does not."""
        t = self.thresholds
        usage = s.used_kv_blocks / usable if usable > 0 else 1.0
        settled = s.target_level <= s.level  # on the way to a deeper level the remedy is not yet there
        if preempted and settled:
            return f"preempted ({s.preemptions} so far) at kv_usage {usage:.2f}", True
        drains = s.num_waiting == 0 and s.now_s - self._last_waiting_s >= _QUIET_S
        if drains and need.running <= usable:
            return None  # a tail that fits: a round trip would cost more than it brings
        if usage > t.degrade_above:
            return f"kv_usage {usage:.2f} > {t.degrade_above:.2f}", False
        head_fits = usable - s.used_kv_blocks >= 2 * need.per_request
        if s.oldest_wait_s > t.queue_delay_s and not head_fits and settled:
            waits = f"oldest wait {s.oldest_wait_s:.2f} s > {t.queue_delay_s:.2f} s"
            return f"{waits} at kv_usage {usage:.2f}", True
        # Requests that wait although the next one would fit wait for something else: prefill, max_num_seqs.
        kept_elsewhere = head_fits and s.oldest_wait_s > max(t.queue_delay_s, 3 * s.step_s)
        expected = need.running if kept_elsewhere else need.total
        if expected > t.degrade_above * usable:
            return f"expected kv_usage {expected / max(usable, 1):.2f} > {t.degrade_above:.2f}", False
        return None

    def _level_for(self, need: float, used: int) -> int:
        """Return the shallowest level that the need fills to `target_usage`, else the deepest useful one.

        The need is what the requests here will hold if all of them end at once, which they do not: on
        windows of real traffic it was 20 % above what was ever used. That is cheap caution within a tier.
        Into a costlier format (W4 on all layers costs ten times the KL of W8 here, for a quarter more blocks)
        only what is really held leads, and no further than it asks; one more level takes a step or two.
        """
        t = self.thresholds
        level = min(bisect_left(self._usable, need / t.target_usage), self._deepest_useful)
        for end in reversed(self._tier_ends):
            if end >= level:
                continue
            full = max(t.degrade_above, _FULL)
            if used > full * self._usable[end]:
                return max(end + 1, min(level, bisect_left(self._usable, used / full)))
            level = end
        return level

    def _unless_slow(self, level: int, used: int, rest: Rest) -> int:
        """Return `level`, or a shallower one that is not slow; deeper only as far as what is held asks."""
        fast = rest.at[level]
        full = max(self.thresholds.degrade_above, _FULL)
        if fast == level or used <= full * self._usable[fast]:
            return fast
        return max(fast + 1, min(level, bisect_left(self._usable, used / full)))

    def _next_useful(self, level: int) -> int:
        """Return the first deeper level with more blocks than `level`, else the deepest useful one."""
        if level >= self._deepest_useful:
            return self._deepest_useful
        return bisect_left(self._usable, self._usable[level] + 1)

    def _note_fits(self, s: Signals, need: float, preempted: bool, rest: Rest) -> None:
        """Remember since when each level would have held the load."""
        t = self.thresholds
        queued = preempted or s.oldest_wait_s > t.queue_delay_s
        first_fit = len(self._usable) if queued else bisect_left(self._usable, need / t.restore_below)
        for level, usable in enumerate(self._usable):
            fits = level >= first_fit
            # Leave the costlier format, and slow levels, early.
            if not fits and not queued and (level in self._tier_ends or level in rest.ends):
                fits = need <= self._leave_tier_below * usable
            if not fits:
                self._fits_since[level] = None
            elif self._fits_since[level] is None:
                self._fits_since[level] = s.now_s

    def _shallowest_rested(self, now_s: float) -> int:
        """Return the shallowest level that has fitted for the whole dwell."""
        self.dwell.decay(now_s)
        for level in range(len(self._usable)):
            since = self._fits_since[level]
            if since is not None and now_s - since >= self.dwell.seconds:
                return level
        return len(self._fits_since)

    def _degrade(self, now_s: float, level: int, reason: str) -> Decision:
        if self._last.level != level:
            self.dwell.degraded(now_s)
            self._last = Decision(level, reason)
        for shallower in range(level):
            self._fits_since[shallower] = None  # the dwell starts anew
        return self._last

    def _restore(self, now_s: float, level: int, need: float) -> Decision:
        if self._last.level != level:
            self.dwell.restored(now_s)
            self._last = Decision(
                level,
                f"need {need:.0f} of {self._usable[level]} blocks <= {self.thresholds.restore_below:.2f} "
                f"for {self.dwell.seconds:.1f} s",
            )
        return self._last

    def _stay(self, heading: int) -> Decision:
        level = min(heading, self.thresholds.max_level)
        if self._last.level != level:
            self._last = Decision(level, f"hold level {level}")
        return self._last


def tier_ends(ladder: Ladder) -> tuple[int, ...]:
    """Return the last level of each tier: behind it a format comes in that no shallower level has."""
    ends = []
    seen: set[str] = {BASE_FORMAT}
    for level in ladder:
        new = level.formats - seen
        if new and seen != {BASE_FORMAT}:
            ends.append(level.index - 1)
        seen |= new
    return tuple(ends)


def rests(ladder: Ladder) -> tuple[Rest, ...]:
    """Return where to rest instead of at a slow level.

    Returns:
        For each measured batch, ascending. One row in which no level is slow, where nothing was measured.
    """
    rows = []
    for i, (batch, _) in enumerate(ladder[-1].time_factors):
        at: list[int] = []
        for level in ladder:
            is_slow = level.index > 0 and level.time_factors[i][1] > _SLOWER
            at.append(at[-1] if is_slow else level.index)
        rows.append(Rest(batch, tuple(at), frozenset(level for level in at if at.count(level) > 1)))
    return tuple(rows) or (Rest(0, tuple(level.index for level in ladder), frozenset()),)
