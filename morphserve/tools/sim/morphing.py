"""The controller that serves, its monitor and its policy, on a simulated engine: told what the real one is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from morphserve.config import Device, MorphServeConfig, settle, step_times_file
from morphserve.control import (
    DEFAULT_FORMATS,
    TIMED_BATCHES,
    Controller,
    DecisionLog,
    EngineView,
    Monitor,
    ProfileLadder,
    WaitingRequest,
    build_ladder,
    check_floor,
    largest_batch_bytes,
    make_header,
    make_ledgers,
    optional_formats,
    without_formats,
)
from morphserve.errors import ConfigError
from morphserve.tools.sim.calibration import Calibration
from morphserve.tools.sim.executor import SimExecutor
from morphserve.tools.sim.gate import SimGate
from morphserve.tools.sim.pace import Pace
from morphserve.tools.sim.pool import SimPool
from morphserve.tools.sim.request import Batch, SimRequest
from morphserve.tools.sim.schedule import Asked, Schedule, SchedulePolicy
from morphserve.tools.sim.scheduler import SimScheduler
from morphserve.tools.sim.server import SimServer
from policies import BASE_FORMAT, EngineLimits, Ladder, Policy, PolicySetup, StepTime, bits_of

_MAX_WARM_UP_TICKS = 10_000


def plan_ladder(
    config: MorphServeConfig, server: SimServer, calibration: Calibration, profile: ProfileLadder | None
) -> Ladder:
    """Build the ladder as the engine does at start, without optional formats that the calibrated one did not have.

    Raises:
        ConfigError: settings, server and calibration contradict each other.
    """
    base = server.num_blocks if config.kv.base_num_blocks is None else config.kv.base_num_blocks
    if base > server.num_blocks:
        raise ConfigError(
            f"kv.base_num_blocks is {base}, the server has {server.num_blocks} blocks. Lower it, or leave it out."
        )
    if config.profile is not None and profile is None:
        raise ConfigError(
            f"profile {config.profile} was not read. Hand its ladder to the simulation, or list ladder.order and steps."
        )
    check_floor(base, server.max_model_len, server.block_size)
    ranks = [calibration.rank_with(server.block_size)]
    device = Device(calibration.num_layers, _formats_of(calibration))
    config = settle(config, device, profile is not None and profile.has_levels).config
    left_out = optional_formats(config.ladder, profile) - calibration.times.formats.keys()
    section = without_formats(config.ladder, left_out)
    ladder = build_ladder(calibration.num_layers, ranks, section, base, config.kv.max_num_blocks, profile)
    try:
        times = calibration.times.of_ladder(ladder)
    except ValueError as e:
        raise ConfigError(str(e)) from e
    return tuple(
        replace(level, time_factors=tuple((n, _factor(time, times[0], n)) for n in TIMED_BATCHES))
        for level, time in zip(ladder, times, strict=True)
    )


def _formats_of(calibration: Calibration) -> list[str]:
    """Return what the calibrated device's default ladder had: of formats with as many bits the usual one."""
    known = sorted(calibration.times.formats.keys() - {BASE_FORMAT}, key=lambda fmt: fmt not in DEFAULT_FORMATS)
    by_bits = {bits_of(fmt): fmt for fmt in reversed(known)}
    return [by_bits[bits] for bits in sorted(by_bits, reverse=True)]


def _factor(time: StepTime, base: StepTime, num_seqs: int) -> float:
    """Return a time factor as the server measures it, but for the part of a step that no format changes."""
    return round(time.seconds(num_seqs, 0, 0) / base.seconds(num_seqs, 0, 0), 3)


class Morphing:
    """The part that `morphserve.integration` has on vLLM: events to the monitor, a tick before every step."""

    def __init__(
        self,
        config: MorphServeConfig,
        server: SimServer,
        calibration: Calibration,
        ladder: Ladder,
        pool: SimPool,
        pace: Pace,
        clock: Callable[[], float],
    ) -> None:
        """Start at level 0.

        Raises:
            ConfigError: a policy that does not fit the ladder.
        """
        rank = calibration.rank_with(server.block_size)
        limits = EngineLimits(server.block_size, server.max_num_seqs, server.max_num_batched_tokens)
        known = step_times_file(config) is not None  # a server without such a file learns its times, so does this one
        setup = PolicySetup(config.policy, calibration.times if known else None, limits)
        try:
            policy = self._asked(setup, ladder)
        except ValueError as e:
            raise ConfigError(f"policy: {e}") from e
        self.ladder = ladder
        self.monitor = Monitor()
        self.executor = SimExecutor(rank, calibration.num_layers, ladder[0].num_kv_blocks, pace, server.copy_s)
        staging = [largest_batch_bytes(rank.layers, config.transition.layers_per_step)]
        self._log: DecisionLog | None = None
        if config.decision_log is not None:  # a sample, whatever the detail: virtual time outruns the writer
            self._log = DecisionLog(config.decision_log, make_header(setup, ladder, detail="changes"))
        self.controller = Controller(
            ladder, policy, pool, self.executor, self.monitor, config, make_ledgers(ladder, [rank], staging),
            ranks=[rank], clock=clock, log=self._log,
        )  # fmt: skip
        self.gate = SimGate(self.monitor, self._on_let_in)
        self._block_size = server.block_size
        self._clock = clock
        self._last_preemption_s = 0.0

    def _asked(self, setup: PolicySetup, ladder: Ladder) -> Policy:
        """Build who is asked for the level."""
        self._policy = Asked(setup.build(ladder))
        return self._policy

    @property
    def schedule(self) -> Schedule:
        """The levels that were wanted so far."""
        return self._policy.schedule

    # ---- before a step

    def tick(self, scheduler: SimScheduler) -> float:
        """Do the controller's part of a step boundary; return for how many seconds the engine stood still for it."""
        waiting = scheduler.waiting
        oldest_s = 0.0
        if waiting:
            head = waiting[0]
            # What a preempted request waits for began when it was preempted.
            oldest_s = max(self._clock() - (self._last_preemption_s if head.preemptions else head.arrival_s), 0.0)
        executor = self.executor
        executor.pause_s = 0.0
        self.controller.tick(EngineView(len(waiting), len(scheduler.running), oldest_s))
        self.gate.enforce(scheduler, self.controller.level_ahead)
        return executor.pause_s

    @property
    def settled_level(self) -> int | None:
        """The level that all layers are at; None = they are between two."""
        level = self.controller.level
        return level if level == self.controller.effective_level else None

    # ---- events

    def on_arrival(self, now_s: float, request: SimRequest, scheduler: SimScheduler) -> None:
        """Tell the monitor of a request that the engine has taken from its input queue, unless it waits for a level."""
        if not self.gate.on_arrival(scheduler, request):
            self.monitor.on_arrival(now_s, WaitingRequest(request.name, request.prompt_tokens))

    def _on_let_in(self, request: SimRequest) -> None:
        now_s = self._clock()
        if request.preemptions:
            self._last_preemption_s = now_s
        self.monitor.on_let_in(now_s, self._waiting(request))

    def on_scheduled(self, now_s: float, batch: Batch) -> None:
        """Tell the monitor of a step that was planned."""
        for request in batch.preempted:
            self.on_preemption(now_s, request)
        for request in batch.admitted:
            if request.preemptions:
                self.monitor.on_resumed(request.name)
            else:
                self.monitor.on_scheduled(now_s, now_s - request.arrival_s, request.name)

    def on_preemption(self, now_s: float, request: SimRequest, forced: bool = False) -> None:
        """Tell the monitor of a preemption: `forced` by a way to a shallower level, or for want of memory."""
        self._last_preemption_s = now_s
        self.monitor.on_preemption(now_s, self._waiting(request), forced)

    def _waiting(self, request: SimRequest) -> WaitingRequest:
        return WaitingRequest(request.name, request.num_tokens, has_token=request.generated > 0)

    def on_completed(self, now_s: float, batch: Batch, level: int | None) -> None:
        """Tell the monitor of a step that has ended.

        Args:
            level: all layers ran at, for the whole of the time since the step before; else None.
        """
        for request in batch.ends:
            # The last token was never put into the KV cache.
            num_blocks = -(-(request.prompt_tokens + request.output_tokens - 1) // self._block_size)
            self.on_finish(now_s, request, num_blocks)
        self.monitor.on_step(
            now_s, batch.num_tokens, batch.num_seqs, batch.prefill_tokens, batch.context_tokens, level
        )
        for request in batch.firsts:
            if request.first_step == batch.step:
                self.monitor.on_first_token(now_s - request.arrival_s)

    def on_finish(self, now_s: float, request: SimRequest, num_blocks: int) -> None:
        """Tell the monitor of a request that ended or was aborted, holding so many blocks."""
        self.monitor.on_finish(num_blocks, now_s, request.name, request.generated)
        self.gate.on_finish(request)

    # ---- the rest

    def settle(self, scheduler: SimScheduler, advance: Callable[[float], None], step_s: float) -> None:
        """Go, before the first request, where the policy wants to be without any."""
        for _ in range(_MAX_WARM_UP_TICKS):
            advance(self.tick(scheduler) + step_s)
            if not self.controller.in_transition:
                return

    def close(self) -> None:
        """Write what the decision log still holds."""
        if self._log is not None:
            self._log.close()

    def status(self, tokens_by_level: list[int]) -> dict[str, Any]:
        """Return what `/morphserve/status` would say, as far as there is something behind it."""
        status = self.controller.status()
        counters = status["counters"]
        return {
            **status,
            "failed": self.controller.failed,
            "transitions": counters["transitions"],
            "transition_seconds": counters["transition_seconds"],
            "errors": counters["errors"],
            "ladder": [
                {
                    "level": level.index,
                    "num_kv_blocks": level.num_kv_blocks,
                    "weight_bytes": level.weight_bytes,
                    "expected_kl": level.expected_kl,
                    "layers_by_format": level.layers_by_format(),
                }
                for level in self.ladder
            ],
            "tokens_by_level": {str(level): tokens for level, tokens in enumerate(tokens_by_level)},
            "pause_ms": {"max": 1e3 * counters["max_pause_s"]},
        }


class ScheduledMorphing(Morphing):
    """The same, following a schedule.

    What that wants depends on nothing that the monitor counts, so nobody tells the monitor; and a tick that would find
    the engine where it is wanted is left out. The run is the same, in a tenth of the time.
    """

    def __init__(self, schedule: Schedule, *args: Any) -> None:
        """Start at level 0; the rest is of `Morphing`."""
        self._schedule = schedule
        super().__init__(*args)

    def _asked(self, setup: PolicySetup, ladder: Ladder) -> Policy:
        self._follows = SchedulePolicy(self._schedule, ladder)
        return self._follows

    @property
    def schedule(self) -> Schedule:
        """The levels that are wanted."""
        return self._schedule

    def tick(self, scheduler: SimScheduler) -> float:
        controller = self.controller
        if (
            not controller.in_transition
            and self._follows.wanted(self._clock()) == controller.level == controller.effective_level
            and not self._has_aborted
        ):
            return 0.0
        return super().tick(scheduler)

    @property
    def _has_aborted(self) -> bool:
        """Whether the controller may wait after a failure, which each tick may end."""
        return any(outcome == "aborted" for _, outcome in self.controller.counters.transitions)

    def on_arrival(self, now_s: float, request: SimRequest, scheduler: SimScheduler) -> None:
        self.gate.on_arrival(scheduler, request)

    def on_scheduled(self, now_s: float, batch: Batch) -> None:
        for request in batch.preempted:
            self.on_preemption(now_s, request)

    def on_preemption(self, now_s: float, request: SimRequest, forced: bool = False) -> None:
        self._last_preemption_s = now_s

    def on_completed(self, now_s: float, batch: Batch, level: int | None) -> None:
        for request in batch.ends:
            self.gate.on_finish(request)

    def on_finish(self, now_s: float, request: SimRequest, num_blocks: int) -> None:
        self.gate.on_finish(request)
