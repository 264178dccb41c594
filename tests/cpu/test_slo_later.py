"""What `slo` does while level 0 serves the load on average: a level as late as it still does, and soon back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cpu.sim_world import CALIBRATION, SERVER, config
from cpu.test_slo_parts import LIMITS, QUIET, feed

from morphserve.tools.sim.morphing import plan_ladder
from policies import Cohort, Signals, SloConfig, SloPolicy
from policies.slo.choice import Terms
from policies.slo.forecast import ArrivalForecast
from policies.slo.predictor import Prediction

LADDER = plan_ladder(config(), SERVER, CALIBRATION, None)


def made() -> SloPolicy:
    return SloPolicy(SloConfig(kind="slo"), LADDER, CALIBRATION.times, LIMITS)


def after_a_minute(rate: float) -> tuple[SloPolicy, int]:
    """A policy that has seen a minute of such arrivals, of which level 0 serves two a second; and how many came."""
    policy = made()
    count = 0
    for half_s in range(120):  # evenly
        count = int(rate * half_s / 2)
        policy._forecast.update(40.0 + half_s / 2, count, 2.0)
    policy._served = 2.0
    return policy, count


def level_after_a_minute(rate: float, signals: Signals) -> int:
    policy, count = after_a_minute(rate)
    return policy.decide(replace(signals, num_arrivals=count)).level


def queue(waited_s: float, number: int = 8, now_s: float = 100.1, **fields: Any) -> Signals:
    """Level 0 is full, and so many wait."""
    blocks = LADDER[0].num_kv_blocks
    return replace(
        QUIET, now_s=now_s, num_kv_blocks=blocks, used_kv_blocks=blocks - 1, num_running=8, num_waiting=number,
        oldest_wait_s=waited_s, waiting=(Cohort(number, 64 * number, now_s - waited_s, now_s - waited_s),),
        step_s=0.02, **fields,
    )  # fmt: skip


def test_a_minute_says_whether_level_zero_serves_what_comes() -> None:
    """Guards: a load that is taken for one that passes although the queue only grows, or the other way round."""
    shares = []
    for rate in (1.0, 3.0):
        served = 0
        for seed in range(20):
            forecast = ArrivalForecast()
            feed(forecast, rate, 0.0, 90.0, 0, seed, served=2.0)
            served += forecast.is_served
        shares.append(served / 20)
    assert shares[0] >= 0.8 and shares[1] <= 0.1


def test_what_nobody_has_seen_yet_is_not_served() -> None:
    """Guards: the first burst after a start met a moment too late, as nobody came before it."""
    forecast = ArrivalForecast()
    assert not forecast.is_served
    forecast.update(0.0, 0, 2.0)
    forecast.update(3.0, 0, 2.0)
    assert not forecast.is_served


@pytest.mark.parametrize("seed", range(5))
def test_more_than_usual_is_not_served(seed: int) -> None:
    """Guards: a burst that is met as late as can be, since the minute before it was quiet."""
    forecast = ArrivalForecast()
    count = feed(forecast, 0.9, 0.0, 300.0, 0, seed, served=2.0)
    feed(forecast, 6.0, 300.0, 2.0, count, seed, served=2.0)
    assert forecast.alarm and not forecast.is_served


def test_a_load_that_has_just_begun_is_not_served() -> None:
    """Guards: the first burst after a quiet hour met a moment too late, as the minute before knows of nothing."""
    silent = 0
    for seed in range(20):
        forecast = ArrivalForecast()
        forecast.update(-600.0, 0, 4.0)
        count = feed(forecast, 1.0, 0.0, 20.0, 0, seed, served=4.0)
        silent += not forecast.alarm
        assert not forecast.is_served
        feed(forecast, 1.0, 20.0, 100.0, count, seed, served=4.0)
    assert silent >= 10, "no alarm says so"


def test_what_level_zero_serves_no_more_now_is_not_served() -> None:
    """Guards: a minute's mean that hides that answers have become longer."""
    forecast = ArrivalForecast()
    count = feed(forecast, 1.5, 0.0, 90.0, 0, 1, served=4.0)
    assert forecast.is_served
    feed(forecast, 1.5, 90.0, 1.0, count, 1, served=0.5)
    assert not forecast.is_served


def test_a_level_is_left_until_it_would_do_no_longer() -> None:
    """Guards: a level for a queue that is gone a moment later by itself; and one that comes too late for it."""
    assert made().decide(queue(0.1)).level > 0
    assert level_after_a_minute(1.0, queue(0.1)) == 0
    assert level_after_a_minute(1.0, queue(1.7)) > 0


def test_a_load_that_level_zero_does_not_serve_gets_its_level_at_once() -> None:
    """Guards: a queue that grows to the limit before anything is done about it, over and over."""
    assert level_after_a_minute(3.0, queue(0.1)) > 0


def test_who_is_promised_more_does_not_wait_longer() -> None:
    """Guards: a request's own limit, which everyone's says nothing of, missed by waiting."""
    strict = queue(0.1)
    own = replace(strict, waiting=(replace(strict.waiting[0], ttft_s=0.6),))
    assert level_after_a_minute(1.0, own) > 0


def test_a_way_back_that_a_queue_meets_turns_at_once() -> None:
    """Guards: blocks that are given back, to be taken again a moment later."""
    assert level_after_a_minute(1.0, replace(queue(0.5), level=1)) == 1


def test_a_queue_that_no_level_serves_in_time_is_not_left_waiting() -> None:
    """Guards: level 0 for as long as all are late anyway, since a moment later they are no later."""
    assert level_after_a_minute(1.0, queue(1.8, 90)) > 0


@pytest.mark.parametrize(("rate", "dwell_s"), [(1.0, 0.1), (3.0, 1.0)])
def test_a_level_is_left_soon_where_level_zero_serves_the_load(rate: float, dwell_s: float) -> None:
    """Guards: a dwell as long as in an overload, where the level comes back at the next moment that asks for it."""
    policy, count = after_a_minute(rate)
    level_zero = []
    for tick in range(16):
        at = {"level": 1, "target_level": 1, "num_kv_blocks": LADDER[1].num_kv_blocks}
        now = replace(QUIET, now_s=100.1 + tick / 10, num_running=1, used_kv_blocks=3, num_arrivals=count, **at)
        if policy.decide(now).level == 0:
            level_zero.append(tick / 10)
    assert level_zero and dwell_s <= level_zero[0] <= dwell_s + 0.21


def test_going_later_may_lose_what_going_costs_and_no_more() -> None:
    """Guards: a level that is put off whoever is late for it, or that is not although nobody would be."""
    terms = Terms(price=100.0, costs=(0.0, 0.01), tokens=500.0, quick_end=1, lasting=0)  # 5 nats, a twentieth of one

    def late(violations: float) -> Prediction:
        return Prediction(violations, 10.0, binds=True, last_wait_s=1.0, tpot_s=0.02)

    assert terms.can_wait((0, 1), late(0.01), [late(0.05)], target=0.01)
    assert not terms.can_wait((0, 1), late(0.01), [late(0.07)], target=0.01)
    assert terms.can_wait((0, 1), late(0.01), [late(0.5), late(0.05)], target=0.01)
    assert not terms.can_wait((0, 1), late(0.5), [late(0.5)], target=0.01), "the promise is not kept"
