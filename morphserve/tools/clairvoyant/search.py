"""Search levels by time for the least cost at a number of late requests: coarse to fine, then one change at a time.

Each candidate is a whole run of the simulated server, so that transitions take what they take, and a queue that a
shallow level leaves is there afterwards. What is found can be done; whether less could, nobody has proved.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

from morphserve.errors import ConfigError
from morphserve.tools.clairvoyant.frontier import Frontier, Point
from morphserve.tools.clairvoyant.world import Limit, World
from morphserve.tools.options import option
from morphserve.tools.sim import Schedule

_FOUND = "search"
_DESCENTS = (0.3, 0.6)  # share of the runs of a target after which the way down from a start is over
_REACH = 8  # cells: a trade is made with another of the neighbourhood
_WIDEST = 3  # cells of a change


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How long is searched, and how fine.

    Raises:
        ConfigError: there is nothing to search with.
    """

    clairvoyant_runs: int = option(
        "of the search: so many simulated runs, most of them given up early", default=2000, metavar="N"
    )
    clairvoyant_chunk_s: float = option(
        "of the search: it changes the level at multiples of that, and moves changes by a quarter of it",
        default=2.0,
        metavar="S",
    )

    def __post_init__(self) -> None:
        if self.clairvoyant_runs < 1:
            raise ConfigError(f"--clairvoyant-runs is {self.clairvoyant_runs}, must be 1 or more.")
        if not 0 < self.clairvoyant_chunk_s < inf:
            raise ConfigError(
                f"--clairvoyant-chunk-s is {self.clairvoyant_chunk_s}, must be above 0 s: 1 to 3 is usual."
            )


def search(
    world: World, starts: Sequence[Point], targets: Sequence[int], end_s: float, options: SearchOptions, seed: int = 0
) -> Frontier:
    """Return the best runs found: at least as good as each of the starts, and as each level that never changes.

    Args:
        world: whose levels are searched.
        starts: runs to begin with.
        targets: numbers of late requests, for each of which the cheapest run is wanted.
        end_s: after it the level changes no more.
        options: how long.
        seed: of what is drawn.
    """
    frontier = Frontier()
    for point in starts:
        frontier.offer(point)
    constant = [world.run(Schedule.constant(level), f"level {level}") for level in range(len(world.ladder))]
    for point in constant:
        frontier.offer(point)
    wanted, begun = sorted(set(targets)), world.num_runs
    for number, target in enumerate(wanted, start=1):
        last = begun + options.clairvoyant_runs * number // len(wanted)
        grid = _grid(end_s, options.clairvoyant_chunk_s)
        allowed = (point for point in constant if point.late <= target)
        begin = [frontier.best(target), *sorted(allowed, key=lambda point: point.kl)[:1]]
        _Target(world, frontier, target, last, grid, seed).search(begin)
    return frontier


def _grid(end_s: float, chunk_s: float) -> list[float]:
    """Return the edges of the cells; the last cell has no end."""
    return [*(i * chunk_s for i in range(max(ceil(end_s / chunk_s), 1))), inf]


class _Target:
    """The search for the cheapest run with no more than so many late requests."""

    def __init__(
        self, world: World, frontier: Frontier, max_late: int, last_run: int, edges: Sequence[float], seed: int
    ) -> None:
        self._world = world
        self._frontier = frontier
        self._max_late = max_late
        self._last_run = last_run
        self._edges = edges
        self._num_cells = len(edges) - 1
        self._random = random.Random(f"{seed}/{max_late}")
        self._tried: set[Schedule] = set()
        self._best: Point

    def search(self, starts: Sequence[Point]) -> None:
        """Spend the runs, on the way down from each of the starts first."""
        begun = self._world.num_runs
        for start, share in zip(starts, _DESCENTS, strict=False):
            self._best = start
            self._descend(begun + round(share * (self._last_run - begun)))
        self._best = self._frontier.best(self._max_late)
        stale = 0
        while self._world.num_runs < self._last_run and stale < 50 * self._num_cells:
            stale = 0 if self._try(self._neighbour(self._best.schedule)) else stale + 1
        self._descend(self._last_run)

    def _try(self, schedule: Schedule) -> bool:
        """Run a candidate; where it is better, go on from it."""
        if schedule in self._tried or self._world.num_runs >= self._last_run:
            return False
        self._tried.add(schedule)
        found = self._world.beats(schedule, _FOUND, Limit.of(self._best, self._max_late))
        if found is None:
            return False
        self._frontier.offer(found)
        self._best = found
        self._tried.clear()
        return True

    # ---- from coarse to fine

    def _descend(self, until: int) -> None:
        """Make blocks of cells shallower, half as long each time, as long as that helps."""
        helps = True
        while helps:
            helps = False
            size = 1 << (self._num_cells - 1).bit_length()
            while size:
                for first in range(0, self._num_cells, size):
                    if self._world.num_runs >= until:
                        return
                    helps |= self._lower(first, min(first + size, self._num_cells))
                size //= 2

    def _lower(self, first: int, last: int) -> bool:
        """Bring cells to a shallower level, as shallow as goes of three; return whether one was better."""
        deepest = self._best.schedule.highest(self._edges[first], self._edges[last])
        for level in sorted({0, deepest // 2, max(deepest - 1, 0)}):
            if level < deepest and self._try(self._capped(self._best.schedule, first, last, level)):
                return True
        return False

    # ---- one change at a time

    def _neighbour(self, schedule: Schedule) -> Schedule:
        """Draw a change."""
        draw = self._random
        kind = draw.randrange(4)
        if kind == 0 and len(schedule.levels) > 1:
            return self._moved(schedule)
        first, last = self._cells(draw.randrange(self._num_cells))
        if kind == 1:
            deepest = schedule.highest(self._edges[first], self._edges[last])
            return self._capped(schedule, first, last, draw.randrange(deepest) if deepest else 0)
        deeper = self._raised(schedule, first, last, draw.randrange(len(self._world.ladder)))
        if kind == 2 and self._best.late > self._max_late:
            return deeper
        other = first + draw.randint(-_REACH, _REACH)
        first, last = self._cells(min(max(other, 0), self._num_cells - 1))
        deepest = schedule.highest(self._edges[first], self._edges[last])
        return self._capped(deeper, first, last, draw.randrange(deepest) if deepest else 0)

    def _cells(self, first: int) -> tuple[int, int]:
        return first, min(first + self._random.randint(1, _WIDEST), self._num_cells)

    def _moved(self, schedule: Schedule) -> Schedule:
        """Move a change of level so that the shallower one lasts longer; sometimes the next change as far, too."""
        draw = self._random
        i = draw.randrange(1, len(schedule.levels))
        by_s = self._edges[1] * draw.choice((0.25, 0.5, 1.0)) if self._num_cells > 1 else 0.25
        before, after = schedule.levels[i - 1], schedule.levels[i]
        at_s = schedule.times_s[i]
        if after > before:
            moved = schedule.changed(at_s, at_s + by_s, lambda _: before)
        else:
            moved = schedule.changed(max(at_s - by_s, 0.0), at_s, lambda _: after)
        if i + 1 < len(schedule.levels) and draw.random() < 0.5:
            next_s = schedule.times_s[i + 1]
            moved = moved.changed(next_s, next_s + by_s, lambda _: after)
        return moved

    def _capped(self, schedule: Schedule, first: int, last: int, level: int) -> Schedule:
        return schedule.changed(self._edges[first], self._edges[last], lambda own: min(own, level))

    def _raised(self, schedule: Schedule, first: int, last: int, level: int) -> Schedule:
        return schedule.changed(self._edges[first], self._edges[last], lambda own: max(own, level))
