"""Empties the pool's tail before it is unmapped: live blocks move below the fence, or their requests wait again."""

from __future__ import annotations

from dataclasses import dataclass

from morphserve.config import KVConfig
from morphserve.control.ports import BlockPoolPort, ShrinkProgress


@dataclass(slots=True)
class Preemptions:
    """The last resort of a shrink without room, bounded."""

    total: int = 0
    on_way_back: int = 0  # from the deepest level so far: what `kv.max_preemptions` bounds


class Drain:
    """One fenced tail on its way to empty, and for how long that has got nowhere."""

    def __init__(
        self, pool: BlockPoolPort, config: KVConfig, preemptions: Preemptions, num_kv_blocks: int, now_s: float
    ) -> None:
        """Put up the fence above `num_kv_blocks`."""
        self._pool = pool
        self._config = config
        self._preemptions = preemptions
        self._num_kv_blocks = num_kv_blocks
        self._progress_s = now_s  # when it last got anywhere
        self._num_live_tail = -1
        pool.begin_shrink(num_kv_blocks)

    def timed_out(self, now_s: float) -> str:
        """Why it must be given up, '' while it need not."""
        stuck_s = now_s - self._progress_s
        if stuck_s <= self._config.drain_timeout_s:
            return ""
        return f"{self._num_live_tail} live blocks above {self._num_kv_blocks} found no room in {stuck_s:.1f} s"

    def advance(self, now_s: float) -> ShrinkProgress:
        """Move what finds room. Once nothing has for half of the time-out, preempt a request."""
        step = self._pool.advance_shrink(self._config.migrate_blocks_per_step)
        if step.copies or step.num_live_tail != self._num_live_tail:
            self._progress_s = now_s
            self._num_live_tail = step.num_live_tail
        elif step.num_live_tail and now_s - self._progress_s > self._config.drain_timeout_s / 2:
            self._preempt(now_s)
        return step

    def _preempt(self, now_s: float) -> None:
        preemptions = self._preemptions
        if preemptions.on_way_back < self._config.max_preemptions and self._pool.preempt_one():
            preemptions.on_way_back += 1
            preemptions.total += 1
            self._progress_s = now_s
