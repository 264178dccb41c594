"""The change of level under way, the ones that ended last, and when the next may start."""

from __future__ import annotations

import logging
from typing import Any

from morphserve.backoff import BackOff
from morphserve.config import TransitionConfig
from morphserve.control.decisions import PolicyHost
from morphserve.control.health import Counters
from morphserve.control.layer_state import LayerState
from morphserve.control.ranks import BlockPoolPort
from morphserve.control.transition import BatchEnd, Direction, Outcome, Transition, TransitionEnd, TransitionHistory

logger = logging.getLogger(__name__)

_OTHER: dict[Direction, Direction] = {"degrade": "restore", "restore": "degrade"}


class DirectionBackOff:
    """The waits after failures, in each direction.

    Each attempt of a restore takes KV away from running requests for nothing, and writes a warning: a damaged
    file must not cost that every few seconds for days. Directions count apart, because a restore that fails for
    ever must not keep the engine from degrading in a burst, nor look healed because degrading works.
    """

    def __init__(self, config: TransitionConfig) -> None:
        self._first_s = config.backoff_s
        self._of = {direction: BackOff(config.backoff_s, config.backoff_max_s) for direction in _OTHER}
        self._full_at = 0  # blocks that the last drain did not get down to; 0 = no drain has timed out

    def allows(self, now_s: float, direction: Direction) -> bool:
        """Return whether an attempt may start now."""
        return self._of[direction].allows(now_s)

    def would_allow(self, now_s: float, direction: Direction, num_used_blocks: int) -> bool:
        """Return whether an attempt might start now, if `see_room` were told of these blocks. Changes nothing."""
        has_room = direction == "restore" and num_used_blocks < self._full_at
        return has_room or self.allows(now_s, direction)

    def failed(self, now_s: float, direction: Direction) -> float:
        """Return how long nothing starts in `direction`, in seconds."""
        self._full_at = 0  # a fault's wait is not ended by room
        self._of[_OTHER[direction]].hold(now_s + self._first_s)
        return self._of[direction].failed(now_s)

    def drain_timed_out(self, now_s: float, num_kv_blocks: int, num_used_blocks: int) -> float:
        """Return how long no restore starts after a cache that was too full: no fault, so no longer the second time.

        Args:
            num_kv_blocks: what the cache was to shrink to, null block included.
            num_used_blocks: those that live requests hold. Where they would have fitted, something else stood
                in the way, and only time ends the wait.
        """
        self._full_at = num_kv_blocks if num_used_blocks >= num_kv_blocks else 0
        return self._of["restore"].hold(now_s + self._first_s) - now_s

    def see_room(self, num_used_blocks: int) -> None:
        """End a wait for room once what live requests hold would fit."""
        if num_used_blocks < self._full_at:
            self._of["restore"].release()

    def succeeded(self, direction: Direction) -> None:
        """Forget the failures of a direction that has reached its level."""
        self._of[direction].reset()


class TransitionBook:
    """One transition at a time, from its first line in the log to its last. Counts how each ends, remembers a few."""

    def __init__(
        self, config: TransitionConfig, counters: Counters, state: LayerState, pool: BlockPoolPort, host: PolicyHost
    ) -> None:
        """Begin with none.

        Args:
            config: how long nothing starts after a failure.
            counters: told of each end.
            state: the level that a transition has left, and reached.
            pool: what it has gained.
            host: who decides.
        """
        self.under_way: Transition | None = None
        self.backoff = DirectionBackOff(config)
        self._counters = counters
        self._state = state
        self._pool = pool
        self._host = host
        self.history = TransitionHistory()

    def open(self, now_s: float, target: int, revision: int) -> None:
        """Begin one, on the way to what was decided; `target` is the next level on it."""
        direction, decision = self._state.direction(target), self._host.decision
        start = self._state.effective_level if direction == "restore" else self._state.current
        self.under_way = Transition(
            revision=revision,
            direction=direction,
            reason=decision.reason,
            started_s=now_s,
            blocks_before=self._pool.num_kv_blocks,
            from_level=start,
            policy=self._host.kind,
            order=self._host.order_kind,
        )
        logger.info("morph r%d: level %d -> %d (%s)", revision, start, decision.level, decision.reason)

    def add(self, end: BatchEnd) -> None:
        """Count the layers of a swap batch that was committed."""
        assert self.under_way is not None
        self.under_way.num_layers += end.num_layers
        self.under_way.last_format = end.format
        self._counters.num_layers_switched += end.num_layers

    def note_pause(self, pause_s: float) -> None:
        """Take in how long a command has kept a rank from its next step."""
        assert self.under_way is not None
        self.under_way.longest_pause_s = max(self.under_way.longest_pause_s, pause_s)

    def close(self, now_s: float, outcome: Outcome, error: str = "", place: str = "") -> None:
        """End the one under way where the engine is now; `place`: what has failed, of a few fixed names."""
        assert self.under_way is not None
        if outcome == "committed":
            self.backoff.succeeded(self.under_way.direction)
        is_news = self.history.is_news(self.under_way.direction, outcome, place)  # what keeps failing is one warning
        self._end(now_s, outcome, error, logging.WARNING if outcome == "aborted" and is_news else logging.INFO)

    def _end(self, now_s: float, outcome: Outcome, error: str, log_level: int) -> None:
        t = self.under_way
        assert t is not None
        self.under_way = None
        self._counters.count_transition(t.direction, outcome)
        self._counters.transition_seconds += now_s - t.started_s
        end = TransitionEnd(outcome, now_s, self._state.current, self._pool.num_kv_blocks, error)
        self.history.add(t, end, log_level)

    def abort(self, now_s: float, end: BatchEnd) -> None:
        """End the one under way because a swap batch of it has failed, and start none for a while."""
        assert self.under_way is not None
        if end.place:
            self._counters.count_error(end.place)
            wait_s = self.backoff.failed(now_s, self.under_way.direction)
        else:  # the drain timed out
            wait_s = self.backoff.drain_timed_out(now_s, end.num_kv_blocks, self._pool.num_used_blocks)
        room = "" if end.place else " or until there is room"
        self.close(now_s, "aborted", f"{end.error}; no new attempt for {wait_s:.1f} s{room}", end.place)

    def give_up(self, now_s: float, why: str) -> None:
        """End the one under way, if there is one, with an error that has been told of."""
        if self.under_way is not None:
            self._end(now_s, "aborted", why, logging.INFO)

    def as_json(self, now_s: float) -> list[dict[str, Any]]:
        """Return the ones that ended last, the newest first."""
        return self.history.as_json(now_s)
