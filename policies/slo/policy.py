"""The `slo` policy."""

from __future__ import annotations

from policies.config import SloConfig
from policies.step_times import StepTimes
from policies.types import Decision, EngineLimits, Ladder, Signals


class SloPolicy:
    def __init__(self, config: SloConfig, ladder: Ladder, times: StepTimes, limits: EngineLimits) -> None:
        self.ladder = ladder

    def decide(self, signals: Signals) -> Decision:
        return Decision(0, "not written yet")
