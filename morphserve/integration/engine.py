"""The engine-core side: plan the KV cache for the whole ladder, then tie the controller to the scheduler.

Order at start (vllm/v1/engine/core.py, EngineCore.__init__): workers load the model -> `_initialize_kv_caches`
(we ask the ranks what their layers weigh) -> `get_kv_cache_configs` (we lay the cache out for the deepest
level) -> the scheduler is built (`attach`: publish only level 0's blocks, start the controller).
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.interface import PauseState

from morphserve.config import MorphServeConfig
from morphserve.controller import Controller, DecisionLog, largest_chunk_bytes, make_ledgers
from morphserve.controller.ports import EngineView, Plan
from morphserve.errors import ConfigError
from morphserve.histogram import TimeHistogram
from morphserve.integration import seams
from morphserve.integration.block_pool import VllmBlockPool, blocks_of_one_request, check_supported
from morphserve.integration.checks import make_policy
from morphserve.integration.describe import RankDescription
from morphserve.integration.executor import RpcExecutor
from morphserve.integration.provenance import Provenance
from morphserve.integration.receipts import Receipts
from morphserve.integration.settings import read_ladder, read_settings
from morphserve.ladder import build_ladder, check_floor
from morphserve.monitor import Monitor
from morphserve.rank_bytes import RankBytes, most_uneven
from policies.types import Ladder

logger = logging.getLogger("vllm.morphserve")

WAKE_INTERVAL_S = 0.1  # how often an idle engine above level 0 makes a step of its own


class EngineRuntime:
    """What is known before the scheduler exists."""

    def __init__(self, engine_core: Any, vllm_config: Any, config: MorphServeConfig) -> None:
        self.engine_core = engine_core
        self.vllm_config = vllm_config
        self.config = config
        self.ranks: list[RankDescription] = engine_core.model_executor.collective_rpc("morphserve_describe")
        self.rank_bytes: list[RankBytes] = []
        self.ladder: Ladder = ()
        self.base_num_blocks = 0

    def plan_kv(self, original: Callable[..., Any], specs: Any, available_memory: Any) -> Any:
        """KV cache configs for the deepest level's blocks; the scheduler starts with level 0's.

        Raises:
            ConfigError: the budget does not hold one request, or the pool is not one we can resize.
        """
        base = original(self.vllm_config, specs, available_memory)
        for kv_cache_config in base:
            check_supported(self.vllm_config, kv_cache_config)
        kv = self.config.kv
        self.base_num_blocks = min(c.num_blocks for c in base)
        if kv.base_num_blocks is not None:
            if kv.base_num_blocks > self.base_num_blocks:
                raise ConfigError(
                    f"kv.base_num_blocks is {kv.base_num_blocks}, memory for the KV cache holds "
                    f"{self.base_num_blocks}. Lower it, or leave it out."
                )
            self.base_num_blocks = kv.base_num_blocks
        check_floor(
            self.base_num_blocks,
            self.vllm_config.model_config.max_model_len,
            self.vllm_config.cache_config.block_size,
            max(blocks_of_one_request(self.vllm_config, kv_cache_config) for kv_cache_config in base),
        )
        block_bytes = [c.kv_cache_tensors[0].size // c.num_blocks for c in base]
        self.rank_bytes = [RankBytes(r.layer_bytes, size) for r, size in zip(self.ranks, block_bytes, strict=True)]
        self.ladder = self._ladder()
        cache_config = self.vllm_config.cache_config
        override = cache_config.num_gpu_blocks_override
        cache_config.num_gpu_blocks_override = self.ladder[-1].num_kv_blocks
        try:
            return original(self.vllm_config, specs, available_memory)
        finally:
            cache_config.num_gpu_blocks_override = override

    @property
    def kv_block_bytes(self) -> int:
        """Of one block on the rank where it is largest: pipeline stages differ in their number of layers."""
        return max(rank.kv_block_bytes for rank in self.rank_bytes)

    @property
    def index(self) -> int:
        """Of this data-parallel replica, 0 where there is only one."""
        return int(self.vllm_config.parallel_config.data_parallel_index)

    @property
    def decision_log(self) -> Path | None:
        """Replicas would write into one another's lines: all but the first put their index into the name."""
        path = self.config.decision_log
        if path is None or self.index == 0:
            return path
        return path.with_name(f"{path.stem}.{self.index}{path.suffix}")

    def _ladder(self) -> Ladder:
        """One for all ranks. Says so when a pipeline stage frees what waits for another."""
        ladder = build_ladder(
            self.vllm_config.model_config.get_total_num_hidden_layers(),
            self.rank_bytes,
            self.config.ladder,
            self.base_num_blocks,
            self.config.kv.max_num_blocks,
            read_ladder(self.config),
        )
        if (worst := most_uneven(self.rank_bytes, ladder)) is not None:
            level, least, most = worst
            logger.warning(
                "morphserve: level %d frees the bytes of %d KV blocks on one pipeline stage and of %d on another, and "
                "only the fewer can be published. Name layers of every stage in ladder.order; ladder.steps take the "
                "stages in turn, a profile's own levels are taken as they were measured.",
                level, least, most,
            )  # fmt: skip
        return ladder


class Morph:
    """What the scheduler calls. Nothing in here may raise: an exception would kill the engine."""

    def __init__(self, scheduler: Any, runtime: EngineRuntime) -> None:
        self._scheduler = scheduler
        self._engine = runtime.engine_core
        self.runtime = runtime
        self.wake_due = False
        self.failed = False  # tripped outside the controller's own guard
        self.tokens_by_level = [0] * len(runtime.ladder)
        self._levels_in_flight: dict[int, int] = {}  # id(scheduler output) |-> exposure level
        self._level_of_outputs = 0  # of those that vLLM reads now, or read last
        self._awaiting_first_token: list[Any] = []
        self._last_preemption_wall_s = 0.0
        self._heap_used = False  # a transition has been since the ranks last gave free heap back
        self.tick_times = TimeHistogram()
        self._stop = threading.Event()
        self.pool = VllmBlockPool(scheduler)
        self._publish_base()
        self.provenance = Provenance(scheduler.kv_cache_manager, runtime.config.kv.prefix_reuse)
        self.receipts = Receipts(self.provenance, scheduler.cache_config.block_size)
        self.monitor = Monitor()
        self.executor = RpcExecutor(self._engine.model_executor, len(runtime.ranks))
        path = runtime.decision_log
        self.log = DecisionLog(path) if path else None
        self.controller = self._make_controller()
        self._ladder_page = [
            {
                "level": level.index,
                "num_kv_blocks": level.num_kv_blocks,
                "weight_bytes": level.weight_bytes,
                "expected_kl": level.expected_kl,
                "layers_by_format": level.layers_by_format(),
            }
            for level in runtime.ladder
        ]
        self._wake = threading.Thread(target=self._wake_loop, name="morphserve-wake", daemon=True)
        if hasattr(self._engine, "input_queue"):  # an in-process engine has none, and nobody to wake
            self.wake_due = True  # a step before the first request: the policy may want another level
            self._wake.start()

    def _make_controller(self) -> Controller:
        """At level 0, which pool and ranks must be at."""
        runtime, config = self.runtime, self.runtime.config
        # A matmul that keeps a copy of its own (oneDNN) is built while the tensor it reads is still there.
        staging = [
            largest_chunk_bytes(rank.layer_bytes, config.transition.max_layers_per_step) + rank.largest_linear_bytes
            for rank in runtime.ranks
        ]
        return Controller(
            runtime.ladder,
            make_policy(config, runtime.ladder),
            self.pool,
            self.executor,
            self.monitor,
            config,
            make_ledgers(runtime.ladder, runtime.rank_bytes, staging),
            ranks=runtime.rank_bytes,
            clock=time.monotonic,
            log=self.log,
            on_level=self._on_level,
        )

    def _publish_base(self) -> None:
        """The cache is laid out for the deepest level; the scheduler gets level 0's blocks, mapped."""
        base = self.runtime.base_num_blocks
        if base < self.pool.num_kv_blocks:
            self.pool.begin_shrink(base)
            self.pool.advance_shrink(0)
            self.pool.finish_shrink()
        rpc = self._engine.model_executor.collective_rpc
        worst = rpc("morphserve_worst_forward", args=(False,))
        if None in worst:  # a forward pass is all ranks' together
            worst = rpc("morphserve_worst_forward", args=(True,))
        self.worst_forward_bytes = sum(worst)
        rpc("morphserve_keep_free", args=(self.worst_forward_bytes, len(worst)))
        plan = Plan(revision=0, layer_formats=(), num_kv_blocks=base)
        replies = rpc("morphserve_commit", args=(plan,))
        short = [r for r in replies if not r.ok or r.num_kv_blocks < base]
        if short:
            raise ConfigError(
                f"rank {short[0].rank} could not map {base} KV blocks: {short[0].error or 'out of memory'}. "
                "Lower VLLM_CPU_KVCACHE_SPACE or --num-gpu-blocks-override."
            )

    # -- called by the scheduler, once per engine step --------------------------------------------

    def before_schedule(self) -> None:
        """Controller first, then vLLM's own schedule()."""
        start = time.perf_counter()
        self.wake_due = False
        if self.failed:
            self._tick()
        else:
            self._guard(self._tick)
        self.tick_times.add(time.perf_counter() - start)

    def after_schedule(self, output: Any) -> None:
        self._guard(self._after_schedule, output)

    def before_update(self, output: Any) -> None:
        """Requests that end while vLLM reads `output` end at the level it was made at."""
        self._level_of_outputs = self._levels_in_flight.get(id(output), self._level_of_outputs)

    def after_update(self, output: Any, model_output: Any, made: Any) -> None:
        self._guard(self._after_update, output, model_output)
        self._guard(self._attach_receipts, made)

    def on_arrival(self, request: Any) -> None:
        self._guard(self._on_arrival, request)

    def on_preemption(self) -> None:
        self._guard(self._on_preemption)

    def on_finish(self, request: Any) -> None:
        self._guard(self._on_finish, request)
        self.provenance.forget(request.request_id)

    def _guard(self, call: Callable[..., None], *args: Any) -> None:
        if self.failed:
            return
        try:
            call(*args)
        except Exception:
            # Without its signals the policy must rest. The controller is ticked on: it finishes or undoes
            # what is under way, and the server goes on at the level it then has.
            self.failed = True
            self.controller.trip("glue")  # logs the error under way

    def _tick(self) -> None:
        view = EngineView(0, 0, 0.0) if self.failed else self._view()
        self.controller.tick(view)
        # Idle in mid-transition: ask for the next step at once instead of waiting to be woken.
        busy = view.num_running + view.num_waiting > 0
        self.wake_due = not busy and self.controller.in_transition and self._may_wake()

    def _view(self) -> EngineView:
        num_running, num_waiting = self._scheduler.get_request_counts()
        waiting = self._scheduler.waiting
        oldest = 0.0
        if len(waiting):
            head = waiting.peek_request()
            # A preempted request is put back at the head with the arrival time it always had; what it
            # waits for began when it was preempted.
            since = self._last_preemption_wall_s if head.num_preemptions else head.arrival_time
            oldest = max(0.0, time.time() - since)
        return EngineView(num_waiting, num_running, oldest)

    def _may_wake(self) -> bool:
        """A paused engine was promised to be idle."""
        return self._scheduler.pause_state == PauseState.UNPAUSED

    def _after_schedule(self, output: Any) -> None:
        level = self.controller.exposure_level
        self._levels_in_flight[id(output)] = level
        self.receipts.on_scheduled(output.num_scheduled_tokens, level)
        new = output.scheduled_new_reqs
        if not new:
            return
        now, wall = time.monotonic(), time.time()
        for data in new:
            request = self._scheduler.requests.get(data.req_id)
            if request is not None:
                self.monitor.on_scheduled(now, max(0.0, wall - request.arrival_time))
                self._awaiting_first_token.append(request)

    def _after_update(self, output: Any, model_output: Any) -> None:
        level = self._levels_in_flight.pop(id(output), self.controller.exposure_level)
        num_tokens = sum(map(len, model_output.sampled_token_ids or ()))
        self.tokens_by_level[level] += num_tokens
        self.receipts.on_sampled(level)
        self.monitor.on_step(time.monotonic(), num_tokens)
        if self._awaiting_first_token:
            wall = time.time()
            still: list[Any] = []
            for request in self._awaiting_first_token:
                if request.num_output_tokens > 0:
                    self.monitor.on_first_token(max(0.0, wall - request.arrival_time))
                elif not request.is_finished():
                    still.append(request)
            self._awaiting_first_token = still
        if self._heap_used:
            self._trim_when_idle()

    def _trim_when_idle(self) -> None:
        """Small tensors of the variants live in the heap and leave free pages there: give them back, once
        after each return to level 0, when no request can notice the milliseconds."""
        controller = self.controller
        restored = controller.exposure_level == 0 and not controller.in_transition
        if restored and not self._scheduler.has_unfinished_requests():
            self._heap_used = False
            self.executor.trim()

    def _attach_receipts(self, made: Any) -> None:
        self.receipts.attach(output for outputs in made.values() for output in outputs.outputs)

    def _on_arrival(self, request: Any) -> None:
        self.monitor.on_arrival(time.monotonic())
        self.receipts.on_arrival(request)

    def _on_preemption(self) -> None:
        self._last_preemption_wall_s = time.time()
        self.monitor.on_preemption(time.monotonic())

    def _on_finish(self, request: Any) -> None:
        num_blocks = sum(map(len, self._scheduler.kv_cache_manager.get_block_ids(request.request_id)))
        self.monitor.on_finish(num_blocks, time.monotonic())
        self.receipts.on_finish(request, self._level_of_outputs)

    def _on_level(self, level: int) -> None:
        """The next forward pass runs at `level`."""
        self._heap_used = True
        self.provenance.set_level(level)

    # -- idle ---------------------------------------------------------------------------------------

    def _wake_loop(self) -> None:
        """vLLM's loop sleeps when idle: give it a step while a level above 0 waits to be restored."""
        from vllm.v1.engine import EngineCoreRequestType

        while not self._stop.wait(WAKE_INTERVAL_S):
            idle = not self._scheduler.has_unfinished_requests() and self._may_wake()
            if idle and self.controller.wants_wakeup and not self.wake_due:
                self.wake_due = True
                self._engine.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def close(self) -> None:
        """Stop the wake-ups and flush the decision log. Re-entrant."""
        self._stop.set()
        self.wake_due = False
        if self.log is not None:
            self.log.close()

    # -- status ---------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Plain values for the status page and the metrics."""
        pauses = sorted(self.executor.pauses)
        status = self.controller.status()
        counters = status["counters"]
        return {
            **status,
            "engine": self.runtime.index,
            "failed": self.failed or status["tripped"],
            "mapped_kv_blocks": counters["num_blocks_mapped"],
            "transitions": counters["transitions"],
            "transition_seconds": counters["transition_seconds"],
            "errors": counters["errors"],
            "ladder": self._ladder_page,
            "controller_time": self.tick_times.as_json(),
            "kernels": dict(self.runtime.ranks[0].kernels),
            "kv_block_bytes": self.runtime.kv_block_bytes,
            "worst_forward_bytes": self.worst_forward_bytes,
            "tokens_by_level": {str(k): n for k, n in enumerate(self.tokens_by_level)},
            "pause_ms": {
                "count": len(pauses),
                "p50": 1e3 * pauses[len(pauses) // 2] if pauses else None,
                "max": 1e3 * counters["max_pause_s"] if pauses else None,
            },
        }


_RUNTIMES: dict[int, EngineRuntime] = {}  # id(vllm_config) |-> runtime, between planning and attach


def install() -> None:
    """Wrap the engine core. Re-entrant; engines without MorphServe pass straight through."""
    seams.wrap("vllm.v1.engine.core:EngineCore._initialize_kv_caches", _initialize_kv_caches)
    seams.wrap("vllm.v1.engine.core:get_kv_cache_configs", _get_kv_cache_configs)
    from vllm.v1.engine.core import EngineCore

    if not hasattr(EngineCore, "morphserve_status"):
        EngineCore.morphserve_status = _status


def _initialize_kv_caches(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        config = read_settings(vllm_config.additional_config)
        if config is not None:
            _RUNTIMES[id(vllm_config)] = EngineRuntime(self, vllm_config, config)
        return original(self, vllm_config)

    return initialize_kv_caches


def _get_kv_cache_configs(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def get_kv_cache_configs(vllm_config: Any, kv_cache_specs: Any, available_memory: Any) -> Any:
        runtime = _RUNTIMES.get(id(vllm_config))
        if runtime is None:
            return original(vllm_config, kv_cache_specs, available_memory)
        return runtime.plan_kv(original, kv_cache_specs, available_memory)

    return get_kv_cache_configs


def attach(scheduler: Any) -> Morph:
    """Called from the scheduler's constructor."""
    # vLLM configures the handlers of its own logger only; the packages that do not know vLLM log through it.
    logging.getLogger("morphserve").parent = logging.getLogger("vllm")
    return Morph(scheduler, _RUNTIMES.pop(id(scheduler.vllm_config)))


def _status(self: Any) -> dict[str, Any] | None:
    """Utility method of EngineCore; runs between two steps, on the engine's own thread."""
    morph = getattr(self.scheduler, "morph", None)
    return None if morph is None else morph.status()

