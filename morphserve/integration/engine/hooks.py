"""What the scheduler calls at every step: the controller's way in, and what the controller is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.interface import PauseState

from morphserve.control import (
    Action,
    Controller,
    DecisionLog,
    EngineView,
    Health,
    Monitor,
    PolicyReloader,
    ReloadWatch,
    make_header,
)
from morphserve.errors import EngineLostError, OrderError
from morphserve.integration import spans
from morphserve.integration.engine.block_pool import VllmBlockPool
from morphserve.integration.engine.executor import RpcExecutor
from morphserve.integration.engine.histogram import TimeHistogram
from morphserve.integration.engine.idle_ticker import IdleTicker
from morphserve.integration.engine.provenance import Provenance
from morphserve.integration.engine.publish import publish_base
from morphserve.integration.engine.requests import FloorGate, Receipts, StepInFlight, Traffic
from morphserve.integration.engine.runtime import EngineRuntime
from morphserve.integration.engine.status import StatusPage
from morphserve.integration.start import for_this_device, make_policy, policy_setup
from policies import Floors, PolicySetup, promise_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request


class Morph:
    """What the scheduler calls. Nothing in here may raise: an exception would kill the engine.

    But for one that is meant to: what ranks hold is unknown, and no token may come of it (`EngineLostError`).
    """

    def __init__(self, scheduler: Scheduler, runtime: EngineRuntime) -> None:
        self._scheduler = scheduler
        self.runtime = runtime
        self.wake_due = False
        self.health = Health.RUNNING  # of what feeds the controller, which has its own
        runtime.take_spare()
        self.tokens_by_level = [0] * len(runtime.ladder)
        self._in_flight: dict[int, StepInFlight] = {}  # by id(scheduler output)
        self._between_turns: set[str] = set()  # sessions that wait for their next input
        self._heap_used = False  # a transition has been since the ranks last gave free heap back
        self.tick_times = TimeHistogram()
        model_executor = runtime.engine_core.model_executor
        self.pool = VllmBlockPool(scheduler)
        self.worst_forward_bytes = publish_base(self.pool, model_executor.collective_rpc, runtime.base_num_blocks)
        self.provenance = Provenance(scheduler.kv_cache_manager, runtime.config.kv.prefix_reuse)
        self.provenance.on_error = lambda: self.controller.counters.count_error("provenance")
        self.receipts = Receipts(self.provenance, scheduler.cache_config.block_size)
        self.monitor = Monitor()
        self.traffic = Traffic(scheduler, self.monitor)
        self.pool.before_forced_preemption = self.before_preemption
        self.pool.on_forced_preemption = lambda request: self.on_preemption(request, forced=True)
        self.executor = RpcExecutor(model_executor, len(runtime.ranks), runtime.in_background)
        self.setup = policy_setup(runtime.config, runtime.vllm_config)
        self.traffic.late.promise = promise_of(self.setup.section)
        self.gate = FloorGate(scheduler, self.traffic, self.pool, Floors.of(self.setup.section.floors, runtime.ladder))
        self.log = self._open_log()
        self.controller = self._make_controller()
        self._trace()
        self._page = StatusPage(runtime, self.executor, self.worst_forward_bytes)
        self._watch = self._watch_settings()
        self._idle_ticker: IdleTicker | None = None
        if hasattr(runtime.engine_core, "input_queue"):  # an in-process engine has none, and nobody to wake
            self.wake_due = True  # a step before the first request: the policy may want another level
            self._idle_ticker = IdleTicker(runtime.engine_core.input_queue, self._claims_step)

    def _open_log(self) -> DecisionLog | None:
        runtime = self.runtime
        if runtime.decision_log is None:
            return None
        detail = runtime.config.decision_log_detail
        return DecisionLog(runtime.decision_log, make_header(self.setup, runtime.ladder, runtime.index, detail))

    def _make_controller(self) -> Controller:
        """Make the controller, at level 0, which pool and ranks must be at."""
        runtime, config = self.runtime, self.runtime.config
        return Controller(
            runtime.ladder,
            make_policy(self.setup, runtime.ladder),
            self.pool,
            self.executor,
            self.monitor,
            config,
            runtime.make_ledgers(),
            ranks=runtime.rank_bytes,
            clock=time.monotonic,
            log=self.log,
            on_level=self._on_level,
        )

    def _trace(self) -> None:
        """Have transitions and the levels of requests in vLLM's traces, where it traces."""
        runtime = self.runtime
        if spans.is_traced(runtime.vllm_config):
            costs = (0.0, *(level.expected_kl for level in runtime.ladder[1:]))
            self.receipts.span_text = partial(spans.levels_as_text, costs)
            self.controller.history.on_end = spans.TransitionSpans(runtime.index)

    def _watch_settings(self) -> ReloadWatch:
        """Return a thread that hands an edited policy to the controller, which asks it from its next tick on."""
        runtime = self.runtime

        def build(setup: PolicySetup) -> Callable[[str], None]:
            self.controller.check_asks()
            policy, floors = make_policy(setup, runtime.ladder), Floors.of(setup.section.floors, runtime.ladder)

            def hand_over(note: str) -> None:
                self.controller.replace_policy(policy, note, setup)
                self.traffic.late.promise = promise_of(setup.section)
                self.gate.floors = floors

            return hand_over

        return ReloadWatch(
            PolicyReloader(
                runtime.config_file,
                runtime.stated,
                self.setup,
                setup_of=lambda config: policy_setup(for_this_device(config, runtime.vllm_config), runtime.vllm_config),
                build=build,
            )
        )

    # -- called by the scheduler, once per engine step --------------------------------------------

    def before_schedule(self) -> None:
        """Let the controller act, before vLLM's own schedule()."""
        start = time.perf_counter()
        self.wake_due = False
        self._guard(self.gate.take_out)
        if self.health is Health.RESTING:
            self._tick()
        else:
            self._guard(self._tick)
        self._enforce_floors()
        self.tick_times.add(time.perf_counter() - start)
        self._end_if_lost()

    def after_schedule(self, output: SchedulerOutput) -> None:
        self._guard(self._after_schedule, output)

    def before_update(self, output: SchedulerOutput) -> None:
        """Look at the step that vLLM is about to read.

        Raises:
            EngineLostError: it was made by ranks of which one had failed to do what cannot fail.
        """
        self.controller.look_back()
        self._end_if_lost()
        self._guard(self._before_update, output)

    def after_update(
        self, output: SchedulerOutput, model_output: ModelRunnerOutput, made: Mapping[int, EngineCoreOutputs]
    ) -> None:
        self._guard(self._after_update, output, model_output)
        self._guard(self._attach_receipts, made)

    def on_arrival(self, request: Request) -> None:
        self._guard(self._on_arrival, request)

    def before_preemption(self, request: Request) -> None:
        self._guard(self._before_preemption, request)

    def on_preemption(self, request: Request, forced: bool = False) -> None:
        self._guard(self.traffic.on_preemption, request, forced or self.pool.is_discarding)

    def on_turn_end(self, request: Request) -> None:
        """Take in that a session's turn has stopped: to all but its KV, the end of a request."""
        self._guard(self._on_turn_end, request)

    def on_turn(self, request: Request) -> None:
        """Take in that a session goes on with more input."""
        self._guard(self._on_turn, request)

    def on_finish(self, request: Request) -> None:
        self._guard(self._on_finish, request)
        self.provenance.forget(request.request_id)

    def _guard(self, call: Callable[..., None], *args: Any) -> None:
        if self.health is Health.RESTING:
            return
        try:
            call(*args)
        except Exception:
            # Without its signals the policy must rest. The controller is ticked on: it finishes or undoes
            # what is under way, and the server goes on at the level it then has.
            self.health = self.health.to(Health.RESTING)
            self.controller.fail("hooks")  # logs the error under way

    def _end_if_lost(self) -> None:
        if lost := self.controller.lost:
            raise EngineLostError(
                f"{lost}. Ranks may hold other weights or KV blocks than each other, so the engine ends instead of "
                "serving from them. Start it again, or have a supervisor do it; the log above says which rank failed."
            )

    def _tick(self) -> None:
        view = self._view()
        self.controller.tick(view)
        # Idle in mid-transition: ask for the next step at once instead of waiting to be woken.
        busy = view.num_running + view.num_waiting > 0
        self.wake_due = not busy and self.controller.in_transition and self._may_wake()

    def _enforce_floors(self) -> None:
        """Serve nobody below the level that he has asked for; all, once nobody decides on levels any more."""
        if self.health is Health.RUNNING and not self.controller.failed:
            self._guard(self.gate.enforce, self.controller.level_ahead)
        if self.health is not Health.RUNNING or self.controller.failed:
            with suppress(Exception):  # an error has been told of, and nothing more is met at every step
                self.gate.open()

    @property
    def wants_step(self) -> bool:
        """Whether an engine without other requests should make a step.

        For those held, too, where nothing else would wake it: in-process, and when it ends once it has no work.
        """
        if self.wake_due or not self.gate.num_held:
            return self.wake_due
        return self._idle_ticker is None or not self.runtime.engine_core.is_running()

    def _view(self) -> EngineView:
        """Return the queues; empty ones once reading them has failed."""
        return EngineView(0, 0, 0.0) if self.health is Health.RESTING else self.traffic.view()

    def _may_wake(self) -> bool:
        """Return whether the idle ticker may ask for a step; a paused engine was promised to be idle."""
        return self._scheduler.pause_state == PauseState.UNPAUSED

    def _after_schedule(self, output: SchedulerOutput) -> None:
        controller = self.controller
        level = controller.effective_level
        settled, used_blocks, ahead = not controller.in_transition, self.pool.num_used_blocks, self._in_flight.values()
        self._in_flight[id(output)] = self.traffic.on_sent(output, level, settled, used_blocks, ahead)
        new, resumed = output.scheduled_new_reqs, output.scheduled_cached_reqs.resumed_req_ids
        self.receipts.on_scheduled(output.num_scheduled_tokens, level, chain((data.req_id for data in new), resumed))
        self.traffic.on_scheduled(new, resumed)
        self.provenance.sweep()

    def _before_update(self, output: SchedulerOutput) -> None:
        """Note the level `output` was made at: requests that end while vLLM reads it end there."""
        if (step := self._in_flight.get(id(output))) is not None:
            self.receipts.before_outputs(step.level)

    def _after_update(self, output: SchedulerOutput, model_output: ModelRunnerOutput) -> None:
        step = self._in_flight.pop(id(output), None) or StepInFlight(self.controller.effective_level)
        level = step.level
        num_tokens = sum(map(len, model_output.sampled_token_ids or ()))
        self.tokens_by_level[level] += num_tokens
        self.traffic.on_step(num_tokens, step, self._in_flight.values())
        if self._heap_used:
            self._trim_when_idle()

    def _trim_when_idle(self) -> None:
        """Small tensors of the variants live in the heap and leave free pages there: give them back, once
        after each return to level 0, when no request can notice the milliseconds."""
        controller = self.controller
        restored = controller.effective_level == 0 and not controller.in_transition
        if restored and not self._scheduler.has_unfinished_requests():
            self._heap_used = False
            self.executor.trim()

    def _attach_receipts(self, made: Mapping[int, EngineCoreOutputs]) -> None:
        self.receipts.attach(output for outputs in made.values() for output in outputs.outputs)

    def _before_preemption(self, request: Request) -> None:
        self.receipts.before_preemption(request)

    def _on_arrival(self, request: Request) -> None:
        if not self.gate.on_arrival(request):
            self.traffic.on_arrival(request)
        self.receipts.on_arrival(request)

    def _on_turn_end(self, request: Request) -> None:
        self._between_turns.add(request.request_id)
        self.traffic.on_turn_end(request)
        self.gate.on_finish(request)
        self.receipts.on_turn_end(request)

    def _on_turn(self, request: Request) -> None:
        self._between_turns.discard(request.request_id)
        if not self.gate.on_arrival(request):
            self.traffic.on_arrival(request)
        self.receipts.on_turn(request)

    def _on_finish(self, request: Request) -> None:
        if request.request_id in self._between_turns:  # of its last turn all is told
            self._between_turns.discard(request.request_id)
            self.receipts.forget(request.request_id)
            return
        self.traffic.on_finish(request)
        self.gate.on_finish(request)
        self.receipts.on_finish(request)

    def _on_level(self, level: int) -> None:
        """Tell who must know that the next forward pass runs at `level`."""
        self._heap_used = True
        self.provenance.set_level(level)

    # -- idle ---------------------------------------------------------------------------------------

    def _claims_step(self) -> bool:
        """Asked by the wake-up thread: a level above 0 waits to be restored, or the policy has not heard of a request
        that waits for its level, and nothing else makes steps."""
        idle = not self._scheduler.has_unfinished_requests() and self._may_wake()
        if idle and (self.controller.wants_wakeup or self.gate.has_news) and not self.wake_due:
            self.wake_due = True
            return True
        return False

    def close(self) -> None:
        """Stop the wake-ups and the watch, and flush the decision log. Re-entrant."""
        self._watch.close()
        if self._idle_ticker is not None:
            self._idle_ticker.close()
        self.wake_due = False
        if self.log is not None:
            self.log.close()

    # -- status ---------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Plain values for the status page and the metrics."""
        page = self._page.render(self.controller.status(), self.tick_times, self.tokens_by_level)
        requests = {**asdict(self._view()), "late": self.traffic.late.as_json(time.time())}
        requests |= {"num_held": self.gate.num_held, "num_held_total": self.gate.num_held_total}
        requests["floors"] = self.gate.for_door(self.controller.min_floor)
        return {**page, **requests, "policy": asdict(self._watch.reloads)}

    def order(
        self, action: Action, text: str, revision: int, is_rehearsal: bool, not_after_s: float, refusal: str = ""
    ) -> dict[str, Any]:
        """Take an operator's order, or say why not; one that comes after `not_after_s` of the wall clock is late.

        `refusal`: why what it orders was refused already, and it is only to be counted.
        """
        answer = {"ok": True, "outcome": "taken", "error": None, "engine": self.runtime.index}
        try:
            if time.time() > not_after_s:
                raise OrderError("late", "the engine came to it when nobody waited for its answer any more")
            self.controller.order(action, text, revision, is_rehearsal, refusal)
        except OrderError as e:
            return {**answer, "ok": False, "outcome": e.outcome, "error": str(e)}
        return answer

    def reload(self, cause: str, sent: str = "", is_rehearsal: bool = False) -> Future[dict[str, Any]]:
        """Read the policy from the settings' file now, or what was sent; the answer comes from the thread that does."""
        answer: Future[dict[str, Any]] = Future()
        index = self.runtime.index
        asked = self._watch.ask(cause, sent, is_rehearsal)
        asked.add_done_callback(lambda done: answer.set_result({**done.result(), "engine": index}))
        return answer
