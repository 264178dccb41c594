"""What the `slo` policy keeps to, whatever it predicts: budget, token bucket, dwell, and limits that requests bring."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cpu.sim_world import CALIBRATION, SERVER, config
from cpu.test_slo_parts import LIMITS, QUIET
from pydantic import ValidationError

from morphserve.config import LadderConfig
from morphserve.tools.sim.morphing import plan_ladder
from policies import Cohort, OwnLimit, Signals, SloConfig, SloPolicy
from policies.slo.choice import Terms
from policies.slo.predictor import Prediction

LADDER = plan_ladder(config(), SERVER, CALIBRATION, None)


def made(**fields: Any) -> SloPolicy:
    return SloPolicy(SloConfig(kind="slo", **fields), LADDER, CALIBRATION.times, LIMITS)


def crowded(level: int = 0, **fields: Any) -> Signals:
    """All blocks are held, and a queue has just come."""
    blocks = LADDER[level].num_kv_blocks
    return replace(
        QUIET, level=level, target_level=level, num_kv_blocks=blocks, used_kv_blocks=blocks - 1, num_waiting=20,
        num_running=blocks // 6, oldest_wait_s=0.6, waiting=(Cohort(20, 1280, 99.4, 99.9),), step_s=0.02,
        **fields,
    )  # fmt: skip


def without_tokens(policy: SloPolicy) -> SloPolicy:
    policy._bucket.level = policy._bucket._rate = 0.0
    return policy


def distrusting(policy: SloPolicy) -> SloPolicy:
    policy.correction._wait_square = 9.0
    return policy


def spent(policy: SloPolicy) -> SloPolicy:
    policy.budget.exhausted, policy.budget._left = True, 0.0
    return policy


def test_a_crowd_is_what_the_other_tests_take_it_for() -> None:
    """Guards: the tests below, which say what keeps the policy from a level that it would take."""
    assert made().decide(crowded()).level > 0
    assert distrusting(made()).decide(crowded()).level > 0


def test_a_limit_as_large_as_a_number_can_be_is_one() -> None:
    """Guards: one request with a limit of 1e308 s that ends morphing until a restart."""
    waiting = (Cohort(1, 90, 99.0, 99.0, 1e308, 1e308, True), Cohort(1, 90, 99.0, 99.0, 1e308, 1e308))
    decision = made().decide(replace(crowded(), waiting=waiting, num_waiting=2, running_limits=(OwnLimit(1e308, 1),)))
    assert 0 <= decision.level < len(LADDER)


@pytest.mark.parametrize("key", ["ttft_s", "tpot_s", "horizon_s", "transitions_per_minute", "quality_budget"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_no_number_is_refused(key: str, value: float) -> None:
    """Guards: an endless promise or horizon, of which predictions make NaN."""
    with pytest.raises(ValidationError, match="finite number"):
        SloConfig.model_validate({"kind": "slo", key: value})


@pytest.mark.parametrize("trusts", [True, False])
def test_a_spent_budget_binds_thresholds_too(trusts: bool) -> None:
    """Guards: W4 for as long as predictions are distrusted, whatever was to be spent."""
    policy = spent(made(quality_budget=50.0))
    policy = policy if trusts else distrusting(policy)
    assert policy.decide(crowded()).level == 0
    assert policy.decide(replace(crowded(2), now_s=101.0)).level == 0


@pytest.mark.parametrize("trusts", [True, False])
def test_the_token_bucket_binds_thresholds_too(trusts: bool) -> None:
    """Guards: a level that swings while predictions are distrusted."""
    policy = without_tokens(made())
    assert (policy if trusts else distrusting(policy)).decide(crowded()).level == 0


def test_tokens_of_a_transition_are_paid_for() -> None:
    """Guards: a long drain at W4 for nothing, in which the budget fills again."""
    policy = made(quality_budget=1e6)
    draining = replace(crowded(3), target_level=0, last_step=None, num_running=10)
    policy.decide(draining)
    assert policy.budget.spent == pytest.approx(10 * (LADDER[3].expected_kl or 0))
    policy.decide(replace(draining, num_running=0, num_waiting=0, waiting=(), now_s=101.0))
    assert policy.budget.spent == pytest.approx(10 * (LADDER[3].expected_kl or 0)), "nobody got a token"


def test_a_budget_needs_levels_whose_cost_is_known() -> None:
    """Guards: level numbers taken for nats, which empty the budget in a second."""
    unknown = tuple(replace(level, expected_kl=None) if level.index == 2 else level for level in LADDER)
    with pytest.raises(ValueError, match=r"level 2.*morphserve measure-kl"):
        SloPolicy(SloConfig(kind="slo", quality_budget=100.0), unknown, CALIBRATION.times, LIMITS)
    SloPolicy(SloConfig(kind="slo"), unknown, CALIBRATION.times, LIMITS)


def test_the_door_opens_again_while_the_budget_is_spent() -> None:
    """Guards: requests refused for minutes after the overload, because nothing else was looked at."""
    policy = spent(made(quality_budget=50.0, shed=True))
    shut = policy.decide(replace(crowded(), num_waiting=200, waiting=(Cohort(200, 12_800, 98.5, 99.9),)))
    assert shut.level == 0 and shut.max_queued_tokens
    assert policy.decide(replace(QUIET, now_s=101.0)).max_queued_tokens is None


def test_a_dwell_begins_anew_when_a_deeper_level_is_needed() -> None:
    """Guards: a restore on one good prediction, because a shallower level would have done long ago."""
    policy = without_tokens(made())  # so that it stays where it is
    policy._rested.since_s = [90.0] * len(LADDER)
    policy.decide(crowded())
    assert policy._rested.since_s == [None] * len(LADDER)


def test_levels_that_were_left_and_needed_again_come_back_after_the_same_dwell() -> None:
    """Guards: a level that is held for five times its dwell for an hour, because a busy minute needed it often."""
    policy, now_s = made(dwell_s=1.0), 100.0
    for _ in range(4):
        assert policy.decide(replace(crowded(), now_s=now_s)).level > 0
        level = policy._last.level
        there = replace(QUIET, level=level, target_level=level, num_kv_blocks=LADDER[level].num_kv_blocks)
        steps = [policy.decide(replace(there, now_s=now_s + 2.0 + 0.1 * step)).level for step in range(13)]
        assert steps[8] == level and steps[-1] == 0, "not before, and not after it"
        now_s += 10.0


def test_a_level_is_paid_for_as_long_as_answers_hold_it() -> None:
    """Guards: W4 for one request, at the price of the three seconds ahead, and then held for eighteen."""
    policy = made()
    near, far = (policy._load(replace(crowded(), output_tokens=tokens), 1.0) for tokens in (100.0, 1000.0))
    assert policy._terms(far).tokens == pytest.approx(10 * policy._terms(near).tokens)


def test_thresholds_that_stand_in_stay_with_levels_that_compute_fast() -> None:
    """Guards: W4 for minutes because a full cache asks for room while predictions are distrusted."""
    policy = distrusting(made())
    assert policy.decide(crowded(1)).level == 1
    assert policy.decide(replace(crowded(2), now_s=101.0)).level == 2, "nor do they leave what was entered before"


def test_an_overload_shuts_the_door() -> None:
    """Guards: no request refused where no level keeps the promise."""
    brief = replace(crowded(1), num_waiting=60, waiting=(Cohort(60, 3840, 98.2, 99.9),))
    assert made(shed=True).decide(brief).max_queued_tokens


def test_a_ladder_that_nobody_measured_is_used() -> None:
    """Guards: numbers of levels taken for nats, for which nobody is worth saving."""
    unknown = tuple(replace(level, expected_kl=None) for level in LADDER)
    assert SloPolicy(SloConfig(kind="slo"), unknown, CALIBRATION.times, LIMITS).decide(crowded()).level > 0


def test_a_deeper_level_is_not_entered_before_its_blocks_are_needed() -> None:
    """Guards: a dear and slow level for a forecast, while free blocks outlast the way there."""
    policy = made()
    early = replace(QUIET, level=1, target_level=1, num_kv_blocks=LADDER[1].num_kv_blocks, num_running=20,
                    used_kv_blocks=60, step_s=0.05)  # fmt: skip
    load = replace(policy._load(early, 1.0), arrival_rate=8.0)
    room, way_s = policy._room, policy._delay_s(early, 3)
    full = replace(early, used_kv_blocks=LADDER[1].num_kv_blocks - 10)
    assert room.lasts(load, 1, way_s)
    assert not room.lasts(replace(load, signals=full), 1, way_s)
    crowd = replace(early, num_waiting=60)
    assert not room.lasts(replace(load, signals=crowd), 1, way_s), "who waits takes blocks, too"
    room.lasts = lambda *_: True  # type: ignore[method-assign]
    assert policy.decide(crowded()).level == 0


def test_nobody_waits_while_it_is_calm() -> None:
    """Guards: a queue for which nothing is done, because few blocks are held."""
    policy = made()
    load = policy._load(replace(QUIET, num_running=1, used_kv_blocks=3), 1.0)
    assert policy._room.is_calm(load)
    assert not policy._room.is_calm(replace(load, signals=replace(load.signals, num_waiting=1)))
    assert not policy._room.is_calm(replace(load, arrival_rate=99.0))


def test_what_a_burst_asks_for_is_not_put_off() -> None:
    """Guards: full precision for a burst, as the level beyond the one that it needs is not needed yet."""
    policy = made()
    policy._room.lasts = lambda *_: True  # type: ignore[method-assign]
    policy._room.waits_elsewhere = lambda *_: False  # type: ignore[method-assign]
    late = [Prediction(violations, 50.0, True, 0.0, 0.05) for violations in (30.0, 20.0, 10.0, 10.0)]
    terms = Terms(1000.0, [0.0, 0.01, 0.02, 0.03], 1000.0, quick_end=3, lasting=2)
    signals = crowded()
    load = policy._load(signals, 1.0)
    assert policy._best(signals, 0, 0, late, terms, load) == (2, "")
    assert policy._best(signals, 2, 2, late, terms, load) == (3, "level 3 is not needed yet")


def test_a_level_that_keeps_the_promise_is_not_left_for_one_that_does_not() -> None:
    """Guards: the quickest level, because a shallower one than the engine's is cheaper and too late."""
    policy, signals = made(), crowded(2)
    late = [Prediction(violations, 50.0, True, 0.0, 0.05) for violations in (30.0, 0.6, 0.4, 0.0)]
    terms = Terms(10.0, [0.0, 0.01, 0.02, 0.03], 1000.0, quick_end=3, lasting=0)
    assert terms.best(late, 0.01) == 3
    assert policy._best(signals, 2, 2, late, terms, policy._load(signals, 1.0))[0] <= 2
    assert policy._best(signals, 1, 1, late, terms, policy._load(signals, 1.0))[0] == 3


def test_a_queue_limit_that_stands_goes_by_all_levels() -> None:
    """Guards: a door that opens as soon as the promise is kept as loosely as a user allows."""
    limit = made(shed=True)._queue_limit
    few, many = (Prediction(violations, 50.0, True, 0.0, 0.05) for violations in (10.0, 20.0))
    assert limit.stays_open(few) and not limit.stays_open(many)
    limit.num_tokens = 100
    assert not limit.stays_open(few)
    never, load = made()._queue_limit, made()._load(crowded(), 1.0)
    never.weigh([many], load)
    assert never.num_tokens is None and never.stays_open(many), "nobody is ever refused"
    limit.num_tokens = None
    limit.weigh([many], load)
    assert limit.num_tokens


def test_a_queue_limit_is_weighed_where_no_deeper_level_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: requests refused for as long as levels are left alone."""
    policy = made(shed=True)
    policy._queue_limit.num_tokens, policy.own_limits.level = 77, 1
    monkeypatch.setattr(Terms, "is_enough", lambda *_: True)
    brief = replace(crowded(1), num_waiting=60, waiting=(Cohort(60, 3840, 98.2, 99.9),))
    assert policy.decide(brief).max_queued_tokens not in (None, 77)


def test_what_stricter_limits_held_is_let_go_while_their_level_is_enough() -> None:
    """Guards: hours of a level that is charged to limits of requests that have long ended."""
    policy = made()
    policy.own_limits.level = 1
    there = replace(QUIET, level=2, target_level=2, num_kv_blocks=LADDER[2].num_kv_blocks)
    for tick in range(40):
        policy.decide(replace(there, now_s=100.0 + tick / 10))
    assert policy.own_limits.level == 0


def test_an_engine_without_a_request_comes_back_whatever_it_predicts() -> None:
    """Guards: for hours no full precision, as rare requests that nobody knows of might be late there a little more
    often: both shares stay as they are, however few come, and nothing more is learned while nobody does. A level that
    is left and entered again all the while, for nobody."""
    steps = {"steps": [{"format": "w8", "layers_per_level": 10}], "expected_kl": {"w8": 0.0289}}
    finely = config().model_copy(update={"ladder": LadderConfig.model_validate(steps)})
    fine = plan_ladder(finely, SERVER, CALIBRATION, None)
    policy = SloPolicy(SloConfig(kind="slo", ttft_s=0.1), fine, CALIBRATION.times, LIMITS)
    policy.correction._wait_square = 0.85**2  # as wrong as predictions may be that are still trusted
    levels = [3]
    for tick in range(450):
        there = {"level": levels[-1], "target_level": levels[-1], "num_kv_blocks": fine[levels[-1]].num_kv_blocks}
        now = {"now_s": 100.0 + tick / 10, "num_arrivals": min(tick // 5, 20)}  # two a second, for ten seconds
        levels.append(policy.decide(replace(QUIET, **now, **there)).level)
    assert set(levels[:100]) == {3}, "while they come that is worth its nats"
    assert levels == sorted(levels, reverse=True) and levels[-1] == 0
    assert policy.predictions == "calibrated"
