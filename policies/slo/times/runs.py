"""Steps as they can be timed: whoever sends a step before it reads the last one times only runs of them.

With asynchronous scheduling vLLM reads what a step computed once the next one is on its way
(vllm/v1/engine/core.py, step_with_batch_queue), and sending a prompt lasts until most of it is computed: on an H200
decode steps of 5.5 ms took 31 ms where a prompt came next, and the prompt's own step 6 ms. A step time is linear in
what the step computes, so the steps around a prompt say together what none of them says alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.step_times import StepTime
from policies.types import StepLoad

_MOST_STEPS, _MOST_S = 4, 0.5  # of one run: where each step has prompts, what two cuts give and take is about equal
_UNSURE_STEPS = 16  # with prompts, behind steps that nobody has timed


@dataclass(frozen=True, slots=True)
class StepRun:
    """Steps at one level, one after the other: the sums of what they took and computed."""

    seconds: float
    num_seqs: int
    prefill_tokens: int
    context_tokens: int
    level: int
    num_steps: int = 1

    @classmethod
    def of(cls, step: StepLoad) -> StepRun:
        """Return a run of one step."""
        return cls(step.seconds, step.num_seqs, step.prefill_tokens, step.context_tokens, step.level)

    def joined(self, step: StepLoad) -> StepRun:
        """Return this run and the step after it."""
        return StepRun(
            self.seconds + step.seconds,
            self.num_seqs + step.num_seqs,
            self.prefill_tokens + step.prefill_tokens,
            self.context_tokens + step.context_tokens,
            self.level,
            self.num_steps + 1,
        )

    @property
    def may_go_on(self) -> bool:
        """Whether another step may join."""
        return self.num_steps < _MOST_STEPS and self.seconds < _MOST_S

    def predicted_s(self, time: StepTime) -> float:
        """Return the seconds that step times say."""
        one = time.seconds(self.num_seqs, self.prefill_tokens, self.context_tokens)
        return one + (self.num_steps - 1) * time.base_s


class Runs:
    """Joins a step with prompts to the step before it, of whose time it may have taken."""

    def __init__(self) -> None:
        self._last: StepRun | None = None
        self._num_unsure = 0  # steps that may be left out until one without prompts has a time of its own

    def add(self, step: StepLoad) -> StepRun | None:
        """Take in the newest step; return the run that has ended before it, if there was one."""
        last = self._last
        if step.prefill_tokens and self._num_unsure:
            self._num_unsure -= 1
            return None
        self._num_unsure = 0
        if last and step.prefill_tokens and last.level == step.level and last.may_go_on:
            self._last = last.joined(step)
            return None
        self._last = StepRun.of(step)
        return last

    def forget(self, is_idle: bool) -> None:
        """Drop the newest run: what nobody has timed came next, and may have taken of its time.

        Args:
            is_idle: nothing came. Otherwise what came may have taken of the time of a step with prompts behind it, too.
        """
        self._last = None
        self._num_unsure = 0 if is_idle else _UNSURE_STEPS
