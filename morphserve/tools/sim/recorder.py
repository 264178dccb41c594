"""The series that a poll of /metrics would have seen."""

from __future__ import annotations

from morphserve.tools.sim.morphing import Morphing
from morphserve.tools.sim.pool import SimPool
from morphserve.tools.sim.scheduler import SimScheduler
from morphserve.tools.workload import Snapshot


class Recorder:
    """Snapshots at a steady beat of virtual time. Between two steps nothing changes, so they cost only themselves."""

    def __init__(
        self,
        every_s: float,
        pool: SimPool,
        scheduler: SimScheduler,
        morphing: Morphing | None,
        tokens_by_level: list[int],
    ) -> None:
        self._every_s = every_s
        self._pool = pool
        self._scheduler = scheduler
        self._morphing = morphing
        self._tokens_by_level = tokens_by_level
        self.series: list[Snapshot] = []

    @property
    def due_s(self) -> float:
        """Time of the next snapshot."""
        return len(self.series) * self._every_s

    def catch_up(self, now_s: float) -> None:
        """Take all snapshots that are due; the engine was as it is now."""
        while self.due_s <= now_s:
            self.series.append(self.snapshot(self.due_s))

    def finish(self, now_s: float) -> None:
        """Take one more snapshot at the end of the run, where no beat falls on it."""
        if not self.series or self.series[-1].t_s < now_s:
            self.series.append(self.snapshot(now_s))

    def snapshot(self, t_s: float) -> Snapshot:
        """Return a snapshot of the engine as it is."""
        pool, scheduler, morphing = self._pool, self._scheduler, self._morphing
        published = pool.num_kv_blocks
        seen = Snapshot(
            t_s=t_s,
            kv_usage=pool.used / (published - 1),
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            preemptions=scheduler.num_preempted,
            blocks_published=published,
            blocks_backed=published,
            blocks_used=pool.used,
        )
        return seen if morphing is None else self._with_level(seen, morphing)

    def _with_level(self, seen: Snapshot, morphing: Morphing) -> Snapshot:
        controller = morphing.controller
        counters = controller.counters
        layers: dict[str, int] = {}
        for fmt in morphing.executor.formats:
            layers[fmt] = layers.get(fmt, 0) + 1
        return Snapshot(
            t_s=seen.t_s,
            kv_usage=seen.kv_usage,
            running=seen.running,
            waiting=seen.waiting,
            preemptions=seen.preemptions,
            level=controller.effective_level,
            blocks_published=seen.blocks_published,
            blocks_backed=counters.num_blocks_mapped,
            blocks_used=seen.blocks_used,
            layers=layers,
            tokens_by_level={str(level): tokens for level, tokens in enumerate(self._tokens_by_level)},
            transitions={f"{direction}/{outcome}": n for (direction, outcome), n in counters.transitions.items()},
            transition_s=counters.transition_seconds,
            errors=dict(counters.errors),
            pause_max_ms=1e3 * counters.max_pause_s,
        )
