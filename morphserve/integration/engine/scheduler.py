"""vLLM's scheduler with the controller at the top of `schedule()`. Nothing of vLLM's body is copied.

vLLM calls `make_scheduler` because `scheduler_cls` names it; a function may stand there
(vllm/v1/engine/core.py only calls it), so the class vLLM would have used is the one that is subclassed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from morphserve.integration.engine import wiring

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request


class _MorphScheduler:
    """Mixin in front of one of vLLM's two scheduler classes. Every override calls through."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.morph = wiring.attach(self)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self.morph.before_schedule()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.morph.after_schedule(output)
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        self.morph.before_update(scheduler_output)
        result = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        self.morph.after_update(scheduler_output, model_runner_output, result)
        return result

    def add_request(self, request: Request) -> None:
        is_new = request.request_id not in self.requests  # type: ignore[attr-defined]
        super().add_request(request)  # type: ignore[misc]
        if is_new:  # else it is more input for a session, or its end
            self.morph.on_arrival(request)

    def _handle_stopped_request(self, request: Request) -> bool:
        if request.resumable:
            self.morph.on_turn_end(request)
        return bool(super()._handle_stopped_request(request))  # type: ignore[misc]

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        super()._update_request_as_session(session, update)  # type: ignore[misc]
        self.morph.on_turn(session)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.morph.before_preemption(request)
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        self.morph.on_preemption(request)

    def _free_blocks(self, request: Request) -> None:
        self.morph.on_finish(request)
        super()._free_blocks(request)  # type: ignore[misc]

    def has_requests(self) -> bool:
        return super().has_requests() or self.morph.wants_step  # type: ignore[misc]

    def shutdown(self) -> None:
        try:
            self.morph.close()
        finally:
            super().shutdown()  # type: ignore[misc]


class MorphScheduler(_MorphScheduler, Scheduler):
    """For engines without async scheduling (the CPU platform turns it off)."""


class MorphAsyncScheduler(_MorphScheduler, AsyncScheduler):
    """For engines with async scheduling."""


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """Build the scheduler that vLLM would have built, morphing."""
    cls = MorphAsyncScheduler if vllm_config.scheduler_config.async_scheduling else MorphScheduler
    return cls(vllm_config=vllm_config, **kwargs)
