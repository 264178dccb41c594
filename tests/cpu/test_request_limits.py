"""Limits that requests bring: what one client asks for must not cost others their quality, or their answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cpu.sim_world import CALIBRATION
from cpu.test_slo_parts import LIMITS, QUIET
from cpu.test_slo_rules import LADDER, made

from morphserve.control import DecisionLog, EngineView, Monitor, RequestLimits, WaitingRequest, make_header
from morphserve.control.decisions.replay_log import replay
from policies import (
    Cohort,
    Decision,
    Order,
    OwnLimit,
    Policy,
    PolicySetup,
    Promise,
    SloConfig,
    SloPolicy,
    ThresholdConfig,
    build_policy,
    hold_budgets,
    promise_of,
    succeed,
)
from policies.config import FloorsConfig
from policies.slo.own_limits import OwnLimits
from tests.fakes import Rig

IMPOSSIBLE = RequestLimits(1e-9, 1e-9)
NONE = RequestLimits()
USUAL = RequestLimits(2.0, 0.15)  # what everyone is promised
TICK_S = 0.05
# Below what IMPOSSIBLE asks for: no floor drops it, so what is seen is that no level keeps it.
NO_FLOOR = {"min_ttft_s": 1e-10, "min_tpot_s": 1e-10}


class Engine:
    """As much of an engine as a policy sees: who runs and waits, and the level that was asked for last."""

    def __init__(self, policy: SloPolicy, level: int) -> None:
        self.policy, self.monitor = policy, Monitor()
        self.level, self.now, self.decision = level, 100.0, Decision(level, "")
        self.running = self.waiting = self.used = 0
        self.order: Order | None = None
        self.log: DecisionLog | None = None

    def run(self, number: int, blocks: int, limits: RequestLimits = NONE) -> None:
        """Let requests run that hold so many blocks each."""
        for _ in range(number):
            self.running, self.used = self.running + 1, self.used + blocks
            name = f"r{self.running}"
            self.monitor.on_arrival(self.now, WaitingRequest(name, 64, limits))
            self.monitor.on_scheduled(self.now, 0.0, name, limits.tpot_s)

    def wait(self, number: int, limits: RequestLimits = NONE) -> None:
        for _ in range(number):
            self.waiting += 1
            self.monitor.on_arrival(self.now, WaitingRequest(f"w{self.waiting}", 64, limits))

    def go(self) -> None:
        """Serve the last that waits, at once and whole."""
        self.monitor.on_scheduled(self.now, TICK_S, f"w{self.waiting}")
        self.monitor.on_finish(1, self.now, f"w{self.waiting}")
        self.waiting -= 1

    def tick(self) -> Decision:
        self.now += TICK_S
        waited_s = self.now - 100.0 if self.waiting else 0.0
        view = EngineView(self.waiting, self.running, waited_s)
        blocks = LADDER[self.level].num_kv_blocks
        self.monitor.on_step(self.now, self.running)
        signals = self.monitor.snapshot(self.now, view, blocks, self.used, self.level, self.level)
        signals = signals if self.order is None else replace(signals, order=self.order)
        self.decision = self.policy.decide(signals)
        if self.log is not None:
            self.log.record(signals, self.decision)
        self.level = self.decision.level
        return self.decision

    def seconds_to_level_0(self) -> float | None:
        for tick in range(400):
            if self.tick().level == 0:
                return tick * TICK_S
        return None


def after_a_burst(limits: RequestLimits, **fields: Any) -> float | None:
    """Seconds from the end of a burst to level 0, while two requests run for as long as one looks."""
    engine = Engine(made(**fields), level=3)
    engine.run(2, 4, limits)
    return engine.seconds_to_level_0()


def test_a_limit_that_no_level_keeps_holds_off_no_restore() -> None:
    """Guards: two requests with a limit of 1e-9 s that keep everybody at W4 for as long as they run."""
    usual = after_a_burst(NONE)
    assert usual is not None and usual < 5.0
    for asked in (IMPOSSIBLE, RequestLimits(tpot_s=1e-9), RequestLimits(tpot_s=5e-324)):
        assert after_a_burst(asked) == usual
        assert after_a_burst(asked, **NO_FLOOR) == usual, "without a floor, too"


def test_a_limit_that_a_level_keeps_counts() -> None:
    """Guards: limits that are taken for impossible whatever they are; a floor or a switch that does nothing."""
    strict = RequestLimits(tpot_s=0.0115)  # 13 ms at level 0, 8 ms in W8
    usual = after_a_burst(NONE)
    assert after_a_burst(strict, **NO_FLOOR) is None
    assert after_a_burst(strict, min_tpot_s=0.012) == usual, "not raised to what W8 alone keeps"
    assert after_a_burst(strict) == usual, "a quarter of what everyone is promised is the floor"
    assert after_a_burst(strict, request_limits=False, **NO_FLOOR) == usual


def test_one_that_runs_is_not_all_that_run() -> None:
    """Guards: the limit of one running request by which all of them are judged: 6 late ones where 1 is."""
    engine = Engine(made(**NO_FLOOR, target=0.2, nats_per_saved_request=1.0), level=1)
    engine.run(1, 1, RequestLimits(tpot_s=0.014))  # 15 ms at level 0, 9 in W8
    engine.run(5, 1)
    assert engine.seconds_to_level_0() is not None


def test_those_that_come_with_a_limit_that_no_level_keeps_hold_off_no_restore() -> None:
    """Guards: a client that sends a short request twice a second, each with a limit of 1e-9 s, and so keeps everybody
    at W4 for as long as it likes."""
    seconds = []
    for limits in (NONE, IMPOSSIBLE, RequestLimits(ttft_s=1e-9)):
        engine = Engine(made(**NO_FLOOR), level=3)
        engine.run(2, 4)
        for tick in range(400):
            if tick % 10 == 0:
                engine.wait(1, limits)
            elif tick % 10 == 1:
                engine.go()
            if engine.tick().level == 0:
                seconds.append(tick * TICK_S)
                break
        else:
            raise AssertionError(f"{limits} holds level {engine.level}")
    assert seconds == 3 * [seconds[0]] and seconds[0] < 10.0


def test_a_queue_of_them_shuts_no_door() -> None:
    """Guards: others told 503 because a queue of impossible limits is late at each level."""
    for limits in (USUAL, IMPOSSIBLE):
        engine = Engine(made(shed=True, **NO_FLOOR), level=0)
        engine.run(4, 4)
        engine.wait(16, limits)
        assert [engine.tick().max_queued_tokens for _ in range(15)] == 15 * [None], limits


@pytest.mark.parametrize("number", [1, 4])
def test_those_that_wait_with_a_limit_that_no_level_keeps_change_nothing(number: int) -> None:
    """Guards: a queue of impossible limits that degrades the engine, or that has other clients refused at the door."""
    answers = []
    for limits in (USUAL, IMPOSSIBLE):
        engine = Engine(made(shed=True, **NO_FLOOR), level=0)
        engine.run(4, 4)
        engine.wait(number, limits)
        engine.wait(4 - number)
        answers.append([(d.level, d.max_queued_tokens) for d in (engine.tick() for _ in range(30))])
    assert answers[0] == answers[1] and answers[0][-1] == (0, None)


@pytest.mark.parametrize("fields", [{"ttft_s": 1e-3}, {"tpot_s": 1e-3}, {"ttft_s": 1e-9, "tpot_s": 1e-9}])
def test_a_policys_promise_that_no_level_keeps_counts_for_none(fields: dict[str, float]) -> None:
    """Guards: a figure in the YAML that holds an engine deep for as long as anybody runs, and has all others refused;
    predictions that nobody can use called good."""
    usual, found = after_a_burst(NONE), after_a_burst(NONE, **fields)
    assert usual is not None and found is not None and found < 10.0
    engine = Engine(made(shed=True, **fields), level=0)
    engine.run(4, 4)
    engine.wait(30)
    deepest = max(engine.tick().level for _ in range(40))
    assert engine.decision.max_queued_tokens is None and engine.policy.predictions == "unkeepable"
    assert deepest > 0, "a burst is a burst all the same"
    engine = Engine(made(shed=True, quality_budget=50.0, **fields), level=0)
    engine.policy.budget.exhausted, engine.policy.budget._left = True, 0.0
    engine.run(4, 4)
    engine.wait(30)
    assert [engine.tick().max_queued_tokens for _ in range(20)] == 20 * [None]


def test_a_promise_that_just_one_level_keeps_is_one() -> None:
    """Guards: a strict promise of the operator's that is taken for one that no level keeps; one that counts and does
    not, in turn, from request to request."""
    policy = made(tpot_s=0.0095)  # 13 ms at level 0, 8 ms in W8
    engine = Engine(policy, level=1)
    engine.run(1, 4)
    assert [engine.tick().level for _ in range(60)] == 60 * [1] and policy.predictions == "calibrated"
    policy = made(ttft_s=0.02)
    told = []
    for number in range(40):  # W8 takes 19.9 ms to the first token, then 20.2, and so on
        policy.decide(replace(QUIET, now_s=100.0 + number, prompt_tokens=84.0 + 2 * (number % 2)))
        told.append(policy.predictions)
    assert told == ["calibrated", *39 * ["unkeepable"]]
    policy.decide(replace(QUIET, now_s=200.0, prompt_tokens=40.0))
    assert policy.predictions == "calibrated"


def test_a_burst_of_them_is_a_burst_like_any_other() -> None:
    """Guards: impossible limits that buy a deeper level, or none, where everyone's promise asks for one."""
    levels = []
    for limits in (NONE, IMPOSSIBLE):
        engine = Engine(made(**NO_FLOOR), level=0)
        engine.run(8, 6)
        engine.wait(20, limits)
        levels.append([engine.tick().level for _ in range(40)])
    assert levels[0] == levels[1] and max(levels[0]) > 0


def test_waiting_requests_are_told_apart_by_what_they_are_promised() -> None:
    """Guards: a promise that some level keeps ignored because others in the queue ask for the impossible."""
    for others in (NONE, IMPOSSIBLE):
        engine = Engine(made(**NO_FLOOR), level=0)
        engine.run(8, 6)
        engine.wait(20, others)
        engine.wait(6, RequestLimits(ttft_s=1.0))
        assert max(engine.tick().level for _ in range(40)) > 0


def test_what_the_operator_allows() -> None:
    """Guards: a floor of the wrong limit, or one that makes a loose limit strict."""
    promise = promise_of(SloConfig(kind="slo", ttft_s=2.0, tpot_s=0.2, min_tpot_s=0.1))
    assert [promise.own_ttft_s(asked) for asked in (1e-9, 0.49, 0.5, 9.0, None)] == [None, None, 0.5, 9.0, None]
    assert [promise.own_tpot_s(asked) for asked in (0.09, 0.1, 0.15)] == [None, 0.1, 0.15]
    deaf = promise_of(SloConfig(kind="slo", request_limits=False))
    assert deaf.own_ttft_s(1.0) is None is deaf.own_tpot_s(1.0) and deaf.ttft_s == 2.0
    assert promise_of(ThresholdConfig(kind="threshold")) == Promise()


STRICT = RequestLimits(tpot_s=0.013)  # six take longer at level 0 and less in W8; the floor is a quarter of 50 ms


def six_of_which_one(limits: RequestLimits, **fields: Any) -> Engine:
    """Six that run at level 1, one of them with a limit of its own; everyone is promised 50 ms per token."""
    engine = Engine(made(tpot_s=0.05, **fields), level=1)
    engine.run(1, 1, limits)
    engine.run(5, 1)
    return engine


def seconds_above_0(engine: Engine, seconds: int) -> float:
    return sum(engine.tick().level > 0 for _ in range(int(seconds / TICK_S))) * TICK_S


def test_one_strict_limit_holds_everybody_no_longer_than_its_budget() -> None:
    """Guards: one client that has everybody served in W8 for as long as its request runs."""
    engine = six_of_which_one(STRICT)
    budget = engine.policy.own_limits.budget
    for _ in range(int(120 / TICK_S)):
        if budget.is_spent:
            break
        assert engine.tick().level == 1
    assert budget.is_spent and 60.0 < engine.now - 100.0 < 65.0 and "60 s an hour" in engine.decision.reason
    assert seconds_above_0(engine, 60) < 5.0 and budget.is_spent and "60 s an hour" in engine.decision.reason
    engine.now += 270.0
    engine.tick()
    assert budget.left_s < 5.9 and seconds_above_0(engine, 5) == 0.0 and budget.is_spent, "not before a tenth is back"
    engine.now += 100.0
    assert 5.0 < seconds_above_0(engine, 60) < 14.0 and "60 s an hour" in engine.decision.reason
    reference = six_of_which_one(STRICT, limits_hold_s=3600.0)
    assert seconds_above_0(reference, 120) == 120.0, "without a bound"


def test_within_the_budget_a_strict_limit_counts() -> None:
    """Guards: a budget that strict limits have not even while it is full; a reason that does not say for whom."""
    engine = six_of_which_one(STRICT)
    assert seconds_above_0(engine, 6) == 6.0
    engine = Engine(made(tpot_s=0.05), level=0)
    engine.run(1, 1, STRICT)
    engine.run(5, 1)
    engine.wait(1)
    engine.tick()
    assert engine.level > 0 and "limits stricter" in engine.decision.reason, engine.decision
    usual = six_of_which_one(NONE)
    assert seconds_above_0(usual, 30) == seconds_above_0(six_of_which_one(STRICT, limits_hold_s=0.0), 30) < 5.0


def test_the_budget_is_of_strict_limits_that_hold_a_level() -> None:
    """Guards: seconds that are spent by looser limits, by everyone's promise, or by an operator's order."""
    for limits in (NONE, RequestLimits(tpot_s=0.06), RequestLimits(tpot_s=0.05), IMPOSSIBLE):
        engine = six_of_which_one(limits)
        seconds_above_0(engine, 30)
        assert engine.policy.own_limits.budget.left_s == 60.0, limits
    for limits in (NONE, STRICT):
        engine = Engine(made(tpot_s=0.014), level=1)  # what everyone is promised asks for it
        engine.run(6, 1, limits)
        assert seconds_above_0(engine, 90) == 90.0 and engine.policy.own_limits.budget.left_s == 60.0
    engine = six_of_which_one(STRICT)
    engine.order = Order("pin", 1, "an order")
    seconds_above_0(engine, 30)
    assert engine.policy.own_limits.budget.left_s == 60.0
    engine.order = None
    seconds_above_0(engine, 10)
    assert engine.policy.own_limits.budget.left_s < 52.0


def test_who_runs_alone_pays_nothing() -> None:
    """Guards: a client that has the server to itself spends an hour's seconds in which it holds up nobody, and has none
    left when others come; one that goes on for nothing when they have come."""
    engine = Engine(made(tpot_s=0.05), level=1)
    engine.run(6, 1, STRICT)
    budget = engine.policy.own_limits.budget
    assert seconds_above_0(engine, 20) == 20.0 and budget.left_s == 60.0
    engine.run(1, 1)
    assert seconds_above_0(engine, 10) > 9.0 and 49.0 < budget.left_s < 51.5


def test_a_limit_that_is_barely_kept_does_not_make_the_level_swing() -> None:
    """Guards: a limit that counts as it is and that no level keeps with air: up for it and back without it, again and
    again."""
    engine = Engine(made(tpot_s=0.05), level=1)
    engine.run(6, 1, STRICT)
    engine.run(1, 1)
    assert {engine.tick().level for _ in range(int(15 / TICK_S))} == {1}


def waits(ttft_s: float | None = None, tpot_s: float | None = None, has_token: bool = False) -> Cohort:
    return Cohort(1, 64, 99.0, 99.0, ttft_s, tpot_s, has_token)


@pytest.mark.parametrize(
    ("running", "limits", "waiting", "is_alone"),
    [
        (2, (OwnLimit(0.03, 2),), (), True),
        (2, (OwnLimit(0.03, 1), OwnLimit(0.02, 1)), (waits(1.0),), True),
        (0, (), (), True),
        (3, (OwnLimit(0.03, 2),), (), False),
        (2, (OwnLimit(0.03, 1), OwnLimit(0.06, 1)), (), False),  # looser than everyone's
        (2, (OwnLimit(0.03, 1), OwnLimit(0.001, 1)), (), False),  # below the operator's floor: everyone's
        (1, (OwnLimit(0.03, 1),), (waits(),), False),
        (1, (OwnLimit(0.03, 1),), (waits(3.0),), False),
        (1, (OwnLimit(0.03, 1),), (waits(None, 0.03, True),), True),
        (1, (OwnLimit(0.03, 1),), (waits(1.0, None, True),), False),  # its first token is out
    ],
)
def test_who_is_alone(running: int, limits: tuple[OwnLimit, ...], waiting: tuple[Cohort, ...], is_alone: bool) -> None:
    """Guards: one of those that are here overlooked, who is held at a level for others and for nothing."""
    own = OwnLimits(60.0, 3, Promise(2.0, 0.05, 0.5, 0.0125))
    signals = replace(QUIET, num_running=running, running_limits=limits, waiting=waiting, num_waiting=len(waiting))
    own.weigh(1, True, signals)
    own.pay(100.0)
    own.pay(130.0)
    assert own.budget.left_s == (60.0 if is_alone else 30.5)


def test_a_reload_refills_nothing() -> None:
    """Guards: an hour's seconds anew with each edit of the settings; others than an hour has now."""
    floors = {"floors": FloorsConfig(shallowest=0, hold_s=20.0)}

    def left(policy: Policy) -> dict[str, float]:
        return {name: budget.left_s for name, budget in hold_budgets(policy).items()}

    def policy(limits_hold_s: float, **section: Any) -> Policy:
        config = SloConfig(kind="slo", tpot_s=0.05, limits_hold_s=limits_hold_s, **section)
        return build_policy(config, LADDER, CALIBRATION.times, LIMITS)

    last = policy(60.0, **floors)
    spent_s = {"floors": 15.0, "limits": 55.0}
    for name, budget in hold_budgets(last).items():
        budget.pay(100.0, False)
        budget.left_s -= spent_s[name]
    for limits_hold_s, expected in ((60.0, 5.0), (100.0, 45.0), (30.0, 0.0)):
        new = policy(limits_hold_s, **floors)
        succeed(new, last)
        assert left(new) == {"floors": 5.0, "limits": expected}
        assert hold_budgets(new)["limits"].is_spent is (expected == 0.0)
        hold_budgets(new)["limits"].pay(100.0, True)
        assert left(new)["limits"] == expected, "time goes on from the last look"
    hold_budgets(last)["limits"].is_spent = True
    for limits_hold_s, is_spent in ((60.0, True), (100.0, False)):
        new = policy(limits_hold_s)
        succeed(new, last)
        assert hold_budgets(new)["limits"].is_spent is is_spent and hold_budgets(new).keys() == {"limits"}


def test_a_level_that_everyones_promise_has_left_behind_is_paid_for() -> None:
    """Guards: a level that a burst has asked for, and that one strict limit keeps long after it, for nothing."""
    engine = six_of_which_one(STRICT)
    engine.policy.own_limits.follow(1)
    assert 60.0 < seconds_above_0(engine, 90) < 70.0


def test_strict_limits_that_come_and_go_are_paid_for() -> None:
    """Guards: a client that sends a short strict request once a second, so that no dwell ever ends, for nothing."""
    engine = six_of_which_one(STRICT)
    spent_s = 0.0
    for tick in range(int(150 / TICK_S)):
        if tick % 20 == 10:
            engine.monitor.on_finish(1, engine.now, "r1")
            engine.running -= 1
        elif tick and tick % 20 == 0:
            engine.monitor.on_arrival(engine.now, WaitingRequest("r1", 64, STRICT))
            engine.monitor.on_scheduled(engine.now, 0.0, "r1", STRICT.tpot_s)
            engine.running += 1
        spent_s += TICK_S * (engine.tick().level > 0)
    assert engine.policy.own_limits.budget.is_spent and 60.0 < spent_s < 75.0


def test_a_log_of_them_replays(tmp_path: Path) -> None:
    """Guards: a budget that runs by anything but what the log has."""
    setup = PolicySetup(SloConfig(kind="slo", tpot_s=0.05, limits_hold_s=10.0), CALIBRATION.times, LIMITS)
    log = DecisionLog(tmp_path / "log", make_header(setup, LADDER))
    engine = six_of_which_one(STRICT)
    policy = setup.build(LADDER)
    assert isinstance(policy, SloPolicy)
    engine.policy, engine.log = policy, log
    assert 10.0 < seconds_above_0(engine, 20) < 16.0
    log.close()
    found = replay(tmp_path / "log")
    assert found.agrees and found.compared == 400 and len(found.logged_levels) > 1, found


def test_the_status_says_what_is_left() -> None:
    """Guards: seconds that an operator cannot see; those of floors shown as those of limits."""
    floors = FloorsConfig(shallowest=0, hold_s=5.0)
    policy = build_policy(SloConfig(kind="slo", floors=floors, limits_hold_s=9.0), LADDER, CALIBRATION.times, LIMITS)
    full = {name: {"per_hour_s": s, "left_s": s, "is_spent": False} for name, s in (("floors", 5.0), ("limits", 9.0))}
    assert Rig(policy=policy).controller.status()["holds"] == full
    assert Rig(policy=made()).controller.status()["holds"].keys() == {"limits"}
    assert Rig().controller.status()["holds"] == {}
