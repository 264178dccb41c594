"""What a question to the policy costs: counted in calls, so that no machine's pace is in it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import pytest
from cpu.test_slo_parts import LIMITS
from cpu.test_slo_rules import LADDER

from morphserve.control import EngineView, Monitor, RequestLimits, WaitingRequest
from policies import Policy, Signals, SloConfig, ThresholdConfig, build_policy
from policies.config import FloorsConfig
from tests.cpu.sim_world import CALIBRATION

TICK_S = 0.06  # longer than the policy rests between two thoughts


def calls_of(do: Callable[[], object]) -> int:
    """How many functions are called, ours and others'."""
    count = 0

    def count_one(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(count_one)
    try:
        do()
    finally:
        sys.setprofile(None)
    return count


def crowd(number: int) -> Monitor:
    """So many that run, wait and are held, with limits and floors of every kind that a client may choose."""
    monitor = Monitor()
    for index in range(number):
        limits = RequestLimits(2.0 ** (index % 15 - 7) * 1.1, 2.0 ** (index % 15 - 11) * 1.1)
        monitor.on_arrival(100.0 + index / number, WaitingRequest(f"r{index}", 64, limits))
        monitor.on_scheduled(101.0, 0.5, f"r{index}", limits.tpot_s)
    for index in range(number):
        limits = RequestLimits(2.0 ** (index % 15 - 7) * 1.1, 1e-9)
        waiting = WaitingRequest(f"w{index}", 64, limits, priority=index % 7)
        monitor.on_arrival(101.0 + index / number, waiting)
    for index in range(number):
        waiting = WaitingRequest(f"p{index}", 64, RequestLimits(None, 2.0 ** (index % 15 - 11) * 1.1), has_token=True)
        monitor.on_preemption(102.0, waiting)
        monitor.on_floor(index % (len(LADDER) - 1), 1)
        monitor.on_held(f"held{index}")
    return monitor


def signals_of(monitor: Monitor, now_s: float, number: int) -> Signals:
    view = EngineView(2 * number, number, now_s - 101.0)
    monitor.on_step(now_s, 4, 4, 0, 400, 0)
    return monitor.snapshot(now_s, view, LADDER[0].num_kv_blocks, LADDER[0].num_kv_blocks - 1, 0, 0)


@pytest.mark.parametrize("section", [SloConfig, ThresholdConfig])
def test_it_does_not_depend_on_how_many_are_here(section: type[SloConfig | ThresholdConfig]) -> None:
    """Guards: steps that take longer the more requests clients send, with floors and limits of their own choice: a walk
    over them at each question, or signals that grow with them."""
    costs = []
    for number in (200, 1600):
        monitor = crowd(number)
        kind = "slo" if section is SloConfig else "threshold"
        config = section(kind=kind, min_ttft_s=1e-3, min_tpot_s=1e-4) if kind == "slo" else section(kind=kind)
        config = config.model_copy(update={"floors": FloorsConfig(shallowest=0)})
        policy = build_policy(config, LADDER, CALIBRATION.times, LIMITS)

        def ask(tick: int, policy: Policy = policy, monitor: Monitor = monitor, number: int = number) -> None:
            policy.decide(signals_of(monitor, 103.0 + tick * TICK_S, number))

        ask(0)
        signals = signals_of(monitor, 103.0 + TICK_S, number)
        assert len(signals.waiting) <= 32 and len(signals.running_limits) == 15 and len(monitor._max_levels) <= 5
        assert signals.max_level == 0 and not signals.max_level_alone
        costs.append([calls_of(partial(ask, tick)) for tick in range(2, 8)])
    few, many = map(sum, costs)
    assert few > 100, "it has thought"
    assert many <= 1.1 * few, costs
