"""One workload on one simulated server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from morphserve.config import MorphServeConfig
from morphserve.control import ProfileLadder, check_floor
from morphserve.errors import ConfigError
from morphserve.tools.sim.calibration import Calibration
from morphserve.tools.sim.engine import SimEngine
from morphserve.tools.sim.morphing import Morphing, ScheduledMorphing, plan_ladder
from morphserve.tools.sim.pace import Pace
from morphserve.tools.sim.pool import SimPool
from morphserve.tools.sim.prefix import CachingScheduler, PromptContents
from morphserve.tools.sim.recorder import Recorder
from morphserve.tools.sim.request import SimRequest, State
from morphserve.tools.sim.schedule import Schedule
from morphserve.tools.sim.scheduler import SimScheduler
from morphserve.tools.sim.server import SimServer
from morphserve.tools.workload import (
    CUTOFF,
    OK,
    TIMEOUT,
    Outcome,
    Replayed,
    Slo,
    Snapshot,
    Workload,
    check_fits,
    timeline,
)
from policies import Floors

REFUSED = "http_503"


@dataclass(slots=True)
class Simulated:
    """The result of a workload: the same figures as of a measured run, and cheaper ones for a tuner."""

    workload: Workload
    server: SimServer
    offset_s: float
    requests: list[SimRequest]
    ends: list[float]  # of the steps, by number
    levels: list[int]  # likewise
    refused: list[SimRequest]
    timed_out: list[SimRequest]
    series: list[Snapshot]
    status: dict[str, Any] | None  # None: stock vLLM
    schedule: Schedule  # the levels that were wanted
    _replayed: Replayed | None = None  # cache

    @property
    def replayed(self) -> Replayed:
        """The run as the client would have recorded it; made when first asked for."""
        if self._replayed is None:
            statuses = {request.index: REFUSED for request in self.refused}
            statuses |= {request.index: TIMEOUT for request in self.timed_out}
            outcomes = [self._outcome(request, statuses.get(request.index)) for request in self.requests]
            self._replayed = Replayed(outcomes, 0.0, self._duration_s(outcomes))
        return self._replayed

    @property
    def outcomes(self) -> list[Outcome]:
        """Outcomes, one a request, in workload order."""
        return self.replayed.outcomes

    def violation_rate(self, slo: Slo) -> float:
        """Return the share of the requests sent that broke a promise: refused, timed out and unfinished ones did."""
        good = sum(is_good(each, self.ends, each.arrival_s - self.offset_s, slo) for each in self.requests)
        return 1.0 - good / len(self.requests)

    @property
    def num_steps(self) -> int:
        """Steps that computed something."""
        return len(self.ends)

    @property
    def preemptions(self) -> int:
        """Preemptions during the workload."""
        return (self.series[-1].preemptions or 0) - (self.series[0].preemptions or 0)

    @property
    def tokens_by_level(self) -> dict[str, int]:
        """Generated tokens by level; empty for stock vLLM."""
        return timeline.gained(self.series[0].tokens_by_level, self.series[-1].tokens_by_level)

    @property
    def transitions(self) -> int:
        """Transitions that reached their level."""
        return timeline.committed(timeline.gained(self.series[0].transitions, self.series[-1].transitions))

    @property
    def expected_kl_per_token(self) -> float | None:
        """Mean expected KL in nats; 0 for stock vLLM, None where a level was never measured."""
        return 0.0 if self.status is None else timeline.expected_kl(self.tokens_by_level, self.status)

    def _duration_s(self, outcomes: list[Outcome]) -> float:
        """Return the time from the first dispatch to the last completion, or to the cut-off."""
        first_s = min(outcome.scheduled_s for outcome in outcomes)
        ended = [outcome.ended_s for outcome in outcomes if outcome.ended_s is not None]
        last_s = max(ended) if len(ended) == len(outcomes) else self.workload.span_s + self.server.cutoff_s
        return max(last_s - first_s, 1e-9)

    def _outcome(self, request: SimRequest, status: str | None) -> Outcome:
        sent_s = request.arrival_s - self.offset_s
        outcome = Outcome(request.index, sent_s, request.prompt_tokens, request.output_tokens, sent_s=sent_s)
        ends = self.ends
        times = [at for first, count in request.runs for at in ends[first : first + count]]
        if times:
            outcome.ttft_s = times[0] - sent_s
            outcome.latency_s = times[-1] - sent_s
            outcome.itls_s = [b - a for a, b in pairwise(times)]
            outcome.output_tokens = len(times)
        if status == REFUSED:
            outcome.ended_s, outcome.error = request.arrival_s, "the queue is full"
        elif status == TIMEOUT:
            outcome.ended_s = sent_s + self.server.request_timeout_s
            outcome.error = f"no complete answer within {self.server.request_timeout_s:g} s"
        elif request.generated == request.output_tokens:
            status, outcome.ended_s = OK, times[-1]
        outcome.status = status or CUTOFF
        return outcome


def is_good(request: SimRequest, ends: Sequence[float], sent_s: float, slo: Slo) -> bool:
    """Return whether a request of a run that is over for it kept its promises.

    Args:
        ends: of the steps, by number.
        sent_s: when the client sent it.
        slo: the promises.
    """
    if request.state is not State.DONE or request.generated < request.output_tokens:
        return False
    first_s, last_s = ends[request.first_step], ends[request.last_step]
    gaps = max(request.output_tokens - 1, 1)
    return first_s - sent_s <= slo.ttft_s and (last_s - first_s) / gaps <= slo.tpot_s


def simulate(
    workload: Workload,
    server: SimServer,
    config: MorphServeConfig | None,
    calibration: Calibration,
    *,
    speed: float = 1.0,
    seed: int = 0,
    profile: ProfileLadder | None = None,
    asking: Callable[[int], object] = lambda index: None,
    schedule: Schedule | None = None,
    give_up: Callable[[SimEngine], bool] | None = None,
) -> Simulated:
    """Send the workload once.

    Args:
        workload: requests; each ends after exactly its output tokens.
        server: the engine, and how the client treats it.
        config: of MorphServe; None = stock vLLM.
        calibration: of machine and model.
        speed: on all times of the machine: 1.1 = everything takes 10 % longer.
        seed: of `server.step_noise`; without noise nothing is drawn.
        profile: what the profile that `config` names says about the ladder.
        asking: from a request's index to its `morphserve_max_level`, None without one.
        schedule: followed in place of the config's policy.
        give_up: asked at each arrival and each snapshot whether what follows is of no interest; the rest of the run is
            then left out.

    Raises:
        ConfigError: what the server would refuse at start, or a speed that is none.
        WorkloadError: a request that the server would refuse.
    """
    if not 0 < speed < float("inf"):
        raise ConfigError(f"speed is {speed}, must be above 0: 1.1 is a machine 10 % slower.")
    check_fits(workload, server.max_model_len)
    check_floor(server.num_blocks, server.max_model_len, server.block_size)
    offset_s = calibration.times.offset_s
    requests = [
        SimRequest(i, str(i), r.input_tokens, r.output_tokens, r.arrival_s + offset_s)
        for i, r in enumerate(workload.requests)
    ]
    pace = Pace(calibration.times, calibration.num_layers, speed, server.step_noise, seed)
    ladder = None if config is None else plan_ladder(config, server, calibration, profile)
    pool = SimPool(server.num_blocks if ladder is None else ladder[0].num_kv_blocks)
    scheduler = _scheduler(workload, server, config, pool)
    engine = SimEngine(server, requests, pace, scheduler)
    morphing = None
    if config is not None and ladder is not None:
        floors = Floors.of(config.policy.floors, ladder)
        for request in requests:
            request.max_level = floors.level_of(asking(request.index), None)
        parts = (config, server, calibration, ladder, pool, pace, lambda: engine.now_s)
        morphing = Morphing(*parts) if schedule is None else ScheduledMorphing(schedule, *parts)
        tell = partial(morphing.on_preemption, forced=True)
        scheduler.on_forced_preemption = lambda request: tell(engine.now_s, request)
    recorder = Recorder(server.snapshot_s, pool, scheduler, morphing, engine.tokens_by_level)
    try:
        engine.run(recorder, morphing, give_up)
    finally:
        if morphing is not None:
            morphing.close()
    status = None if morphing is None else morphing.status(engine.tokens_by_level)
    return Simulated(
        workload, server, offset_s, requests, engine.ends, engine.levels, engine.refused, engine.timed_out,
        recorder.series, status, Schedule.constant(0) if morphing is None else morphing.schedule,
    )  # fmt: skip


def _scheduler(
    workload: Workload, server: SimServer, config: MorphServeConfig | None, pool: SimPool
) -> SimScheduler:
    if not server.prefix_caching:
        return SimScheduler(server, pool)
    reuse = "any" if config is None else config.kv.prefix_reuse
    return CachingScheduler(server, pool, PromptContents.of(workload, server.block_size), reuse)
