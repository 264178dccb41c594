"""Runs of one workload on one simulated server, scored; given up where they cannot be good any more."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice

from morphserve.config import MorphServeConfig
from morphserve.control import ProfileLadder
from morphserve.errors import ConfigError
from morphserve.tools.clairvoyant.frontier import Point
from morphserve.tools.sim import (
    Calibration,
    Schedule,
    SimEngine,
    SimRequest,
    SimServer,
    Simulated,
    is_good,
    plan_ladder,
    simulate,
)
from morphserve.tools.workload import Slo, Workload
from policies import Ladder

_BEAT_S = 1.0  # so often a run is looked at while it goes on


@dataclass(frozen=True, slots=True)
class Limit:
    """What a run must do better than to be of interest."""

    max_late: int  # beyond it fewer late requests count, up to it the cost
    excess: int  # of the run to beat
    kl: float  # of the run to beat

    @classmethod
    def of(cls, point: Point, max_late: int) -> Limit:
        """Return what beats `point` for who allows so many late requests."""
        return cls(max_late, max(point.late - max_late, 0), point.kl)

    def beaten_by(self, late: int, kl: float) -> bool:
        """Return whether so many late requests at that cost are better."""
        return (max(late - self.max_late, 0), kl) < (self.excess, self.kl)


@dataclass(slots=True)
class World:
    """Everything of a run but the levels.

    Attributes:
        num_runs: simulated so far with a schedule, given up or not.
    """

    workload: Workload
    server: SimServer
    config: MorphServeConfig  # its ladder and its transitions; its policy counts for nothing
    calibration: Calibration
    slo: Slo
    speed: float = 1.0
    seed: int = 0
    profile: ProfileLadder | None = None
    num_runs: int = 0
    ladder: Ladder = field(init=False)
    _kl: list[float] = field(init=False)  # by level

    def __post_init__(self) -> None:
        """Build the ladder.

        Raises:
            ConfigError: a level's quality cost was never measured, or the config does not fit the server.
        """
        self.ladder = plan_ladder(self.config, self.server, self.calibration, self.profile)
        unknown = [level.index for level in self.ladder if level.expected_kl is None]
        if unknown:
            raise ConfigError(
                f"levels {', '.join(map(str, unknown))} have no measured quality cost, so there is nothing to make "
                "small. Set ladder.expected_kl in --config (`morphserve measure-kl`), or take a profile's ladder."
            )
        self._kl = [level.expected_kl or 0.0 for level in self.ladder]
        # Nobody looks at the series, and what happens after the last token costs nothing.
        self.server = replace(self.server, snapshot_s=_BEAT_S, restore_wait_s=0.0)

    def run_policy(self, config: MorphServeConfig | None, name: str) -> tuple[Point, float]:
        """Run a policy, or stock vLLM; return what it did and when the last step ended."""
        done = simulate(
            self.workload, self.server, config, self.calibration, speed=self.speed, seed=self.seed, profile=self.profile
        )
        return self._point(done, done.schedule, name), done.ends[-1] if done.ends else 0.0

    def run(self, schedule: Schedule, source: str) -> Point:
        """Follow a schedule."""
        return self._point(self._follow(schedule), schedule, source)

    def beats(self, schedule: Schedule, source: str, limit: Limit) -> Point | None:
        """Follow a schedule as long as it may beat the limit; None = it does not."""
        watch = _Watch(self, limit)
        done = self._follow(schedule, watch)
        if watch.has_given_up:
            return None
        point = self._point(done, schedule, source)
        return point if limit.beaten_by(point.late, point.kl) else None

    def _follow(self, schedule: Schedule, watch: _Watch | None = None) -> Simulated:
        self.num_runs += 1
        return simulate(
            self.workload, self.server, self.config, self.calibration, speed=self.speed, seed=self.seed,
            profile=self.profile, schedule=schedule, give_up=watch,
        )  # fmt: skip

    def kl_so_far(self, tokens_by_level: list[int]) -> float:
        """Return the least cost per token of a run that has made these tokens."""
        nats = sum(kl * tokens for kl, tokens in zip(self._kl, tokens_by_level, strict=True))
        return nats / max(self.workload.output_tokens, 1)

    def _point(self, done: Simulated, schedule: Schedule, source: str) -> Point:
        late = round(done.violation_rate(self.slo) * len(done.requests))
        nats = {int(level): self._kl[int(level)] * tokens for level, tokens in done.tokens_by_level.items()}
        tokens = sum(done.tokens_by_level.values())
        return Point(late, sum(nats.values()) / max(tokens, 1), schedule, source, nats)


class _Watch:
    """Says of a run that goes on whether it may still beat a limit. Late requests and nats only become more."""

    def __init__(self, world: World, limit: Limit) -> None:
        self.has_given_up = False
        self._world = world
        self._limit = limit
        self._late = 0
        self._next = 0  # request that had not come yet when it was last looked
        self._open: list[int] = []

    def __call__(self, engine: SimEngine) -> bool:
        requests, now_s = engine.requests, engine.now_s
        for request in islice(requests, self._next, None):
            if request.arrival_s > now_s:
                break
            self._open.append(request.index)
            self._next += 1
        still_open = []
        for index in self._open:
            late = self._is_late(requests[index], engine)
            if late is None:
                still_open.append(index)
            else:
                self._late += late
        self._open = still_open
        kl = self._world.kl_so_far(engine.tokens_by_level)
        self.has_given_up = not self._limit.beaten_by(self._late, kl)
        return self.has_given_up

    def _is_late(self, request: SimRequest, engine: SimEngine) -> bool | None:
        """Return whether a request has broken a promise; None = it may still keep all."""
        slo, sent_s = self._world.slo, request.arrival_s - self._world.calibration.times.offset_s
        if request.is_done:
            return not is_good(request, engine.ends, sent_s, slo)
        has_token = 0 <= request.first_step < len(engine.ends)
        waited_s = (engine.ends[request.first_step] if has_token else engine.now_s) - sent_s
        return True if waited_s > slo.ttft_s else None
