"""Which level to serve at: pure questions on counters. Standard library and pydantic only."""

from __future__ import annotations

from policies.build import build_policy, hold_budgets, succeed
from policies.config import PolicyConfig, SloConfig, StaticConfig, ThresholdConfig
from policies.floors import Floors
from policies.levels import max_level_of, resolve_level
from policies.orders import ask
from policies.promise import Promise, promise_of
from policies.setup import PolicySetup
from policies.slo import SloPolicy
from policies.static import StaticPolicy
from policies.step_times import LayerMove, StepTime, StepTimes, load_step_times, parse_step_times
from policies.threshold import ThresholdPolicy
from policies.types import (
    BASE_FORMAT,
    Cohort,
    Decision,
    EngineLimits,
    Ladder,
    MorphLevel,
    Order,
    OrderKind,
    OwnLimit,
    Policy,
    Predictions,
    Signals,
    StepLoad,
    bits_of,
)

__all__ = [
    "BASE_FORMAT",
    "Cohort",
    "Decision",
    "Floors",
    "EngineLimits",
    "Ladder",
    "LayerMove",
    "MorphLevel",
    "Order",
    "OrderKind",
    "OwnLimit",
    "Policy",
    "PolicyConfig",
    "PolicySetup",
    "Predictions",
    "Promise",
    "Signals",
    "SloConfig",
    "SloPolicy",
    "StaticConfig",
    "StaticPolicy",
    "StepLoad",
    "StepTime",
    "StepTimes",
    "ThresholdConfig",
    "ThresholdPolicy",
    "ask",
    "bits_of",
    "build_policy",
    "hold_budgets",
    "load_step_times",
    "max_level_of",
    "parse_step_times",
    "promise_of",
    "resolve_level",
    "succeed",
]
