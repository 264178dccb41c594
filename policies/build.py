"""From the `policy:` section to the policy."""

from __future__ import annotations

from policies.config import SloConfig, StaticConfig, ThresholdConfig
from policies.floors import FloorPolicy, Floors
from policies.hold_budget import HoldBudget
from policies.slo import SloPolicy
from policies.static import StaticPolicy
from policies.step_times import StepTimes
from policies.threshold import ThresholdPolicy
from policies.types import EngineLimits, Ladder, Policy


def build_policy(
    config: StaticConfig | ThresholdConfig | SloConfig,
    ladder: Ladder,
    times: StepTimes | None = None,
    limits: EngineLimits | None = None,
) -> Policy:
    """Build the policy that the `policy:` section asks for, on this ladder.

    Args:
        config: the section.
        ladder: all levels.
        times: what calibration measured; None = `slo` learns from the engine's own steps.
        limits: of the engine; `slo` needs them.

    Raises:
        ValueError: the section names a level that the ladder does not have, its thresholds
            contradict each other, or what it needs is missing; the message says value, limit and remedy.
    """
    floors = Floors.of(config.floors, ladder)
    policy = _build(config, ladder, times, limits)
    section = config.floors
    return FloorPolicy(policy, section.hold_s, section.when_spent == "refuse") if floors.are_allowed else policy


def _build(
    config: StaticConfig | ThresholdConfig | SloConfig,
    ladder: Ladder,
    times: StepTimes | None,
    limits: EngineLimits | None,
) -> Policy:
    if isinstance(config, StaticConfig):
        return StaticPolicy(config, ladder)
    if isinstance(config, ThresholdConfig):
        return ThresholdPolicy(config, ladder)
    if limits is None:
        raise ValueError("policy.kind slo needs the engine's limits. Hand them over, or take kind threshold.")
    return SloPolicy(config, ladder, times, limits)


def hold_budgets(policy: Policy) -> dict[str, HoldBudget]:
    """Return for how long requests may still decide the level of all, by what they bring."""
    outer, inner = {}, policy
    if isinstance(policy, FloorPolicy):
        outer, inner = {"floors": policy.budget}, policy.inner
    return {**outer, "limits": inner.own_limits.budget} if isinstance(inner, SloPolicy) else outer


def succeed(policy: Policy, last: Policy) -> None:
    """Let a policy that has seen nothing know what the one in office before it has learned, and what is spent."""
    if isinstance(policy, FloorPolicy) and isinstance(last, FloorPolicy):
        policy.budget.take_over(last.budget)
    policy, last = (p.inner if isinstance(p, FloorPolicy) else p for p in (policy, last))
    if isinstance(policy, SloPolicy) and isinstance(last, SloPolicy):
        policy.take_over(last)
