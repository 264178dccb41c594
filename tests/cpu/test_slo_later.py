"""What `slo` does while level 0 serves the load on average: a level as late as it still does, and soon back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from cpu.sim_world import CALIBRATION, SERVER, config
from cpu.test_slo_parts import LIMITS, QUIET, feed

from morphserve.tools.sim.morphing import plan_ladder
from policies import Cohort, OwnLimit, Signals, SloConfig, SloPolicy
from policies.slo.choice import PutOff, Terms
from policies.slo.forecast import ArrivalForecast
from policies.slo.predictor import Comparison, Prediction
from policies.slo.rested import quick_dwell_s

LADDER = plan_ladder(config(), SERVER, CALIBRATION, None)


def made() -> SloPolicy:
    return SloPolicy(SloConfig(kind="slo"), LADDER, CALIBRATION.times, LIMITS)


def after_a_minute(rate: float, minutes: int = 1, **fields: Any) -> tuple[SloPolicy, int]:
    """A policy that has seen a minute of such arrivals, of which level 0 serves two a second; and how many came."""
    policy = SloPolicy(SloConfig(kind="slo", **fields), LADDER, CALIBRATION.times, LIMITS)
    count = 0
    for half_s in range(120 * minutes + 1):  # evenly
        count = int(rate * half_s / 2)
        policy._forecast.update(100.0 - 60.0 * minutes + half_s / 2, count, 2.0)
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


def test_a_level_is_put_off_until_it_would_do_no_longer() -> None:
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
    assert level_after_a_minute(1.0, replace(queue(0.05), level=1)) == 1


def test_a_queue_that_no_level_serves_in_time_is_not_left_waiting() -> None:
    """Guards: level 0 for as long as all are late anyway, since a moment later they are no later."""
    assert level_after_a_minute(1.0, queue(1.8, 90)) > 0


def with_lasting(policy: SloPolicy, level: int, monkeypatch: pytest.MonkeyPatch) -> SloPolicy:
    """The same, where the compute of no shallower level than `level` keeps up."""
    terms = policy._terms
    monkeypatch.setattr(policy, "_terms", lambda load: replace(terms(load), lasting=level))
    return policy


def test_tokens_that_come_too_slowly_do_not_wait_for_a_quicker_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: everybody late by the time per token for as long as a later moment is no worse than this one."""
    policy, count = after_a_minute(1.0)
    policy._config = SloConfig(kind="slo", tpot_s=0.019)  # level 0 takes 18 ms, give or take two
    now = replace(queue(0.1, 2), num_arrivals=count)
    assert with_lasting(policy, 0, monkeypatch).decide(now).level > 0


def test_compute_that_does_not_keep_up_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a batch that grows until its tokens are late, too, for want of a quicker level."""
    policy, count = after_a_minute(1.0)
    now = replace(queue(0.1), num_arrivals=count)
    assert with_lasting(policy, 1, monkeypatch).decide(now).level > 0


@pytest.mark.parametrize("what", ["does not bind", "is not what they wait for"])
def test_only_who_waits_for_kv_waits(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: prompts that take too long at level 0, of which none ever waits, late one by one."""
    policy, count = after_a_minute(1.0)
    if what == "does not bind":
        compare = policy._predictor.compare

        def unbound(*args: Any) -> Comparison:
            usual = [replace(prediction, binds=False) for prediction in compare(*args).usual]
            return Comparison(usual, usual, [[] for _ in usual])

        monkeypatch.setattr(policy._predictor, "compare", unbound)
    else:
        monkeypatch.setattr(policy._room, "waits_elsewhere", lambda *_: True)
    assert policy.decide(replace(queue(0.1), num_arrivals=count)).level > 0


def test_who_has_longer_is_not_lost() -> None:
    """Guards: levels that come early for all while one waits that may wait a minute."""
    some = queue(0.1)
    patient = Cohort(1, 64, some.now_s - 3.0, some.now_s - 3.0, ttft_s=60.0)
    assert level_after_a_minute(1.0, replace(some, waiting=(patient, *some.waiting), num_waiting=9)) == 0
    assert level_after_a_minute(1.0, replace(some, waiting=(replace(patient, ttft_s=None), *some.waiting))) > 0


def test_who_is_lost_is_no_reason_to_wait_longer() -> None:
    """Guards: level 0 for as long as somebody is late, whose time begins anew at each look."""
    assert level_after_a_minute(1.0, queue(1.9, 16)) > 0
    assert level_after_a_minute(1.0, queue(2.1, 16)) > 0


@pytest.mark.parametrize(("step_s", "later_s"), [(0.02, 0.25), (0.2, 0.4)])
def test_a_step_is_how_long_the_next_look_takes(step_s: float, later_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: long steps, after which it is too late."""
    policy, count = after_a_minute(1.0)
    looks: list[Sequence[tuple[int, float]]] = []
    compare = policy._predictor.compare

    def watched(ways: Sequence[tuple[int, float]], *more: Any) -> Comparison:
        looks.append(ways)
        return compare(ways, *more)

    monkeypatch.setattr(policy._predictor, "compare", watched)
    policy.decide(replace(queue(0.1, 16), step_s=step_s, num_arrivals=count))
    (here, now_s), (there, then_s) = next(ways for ways in looks if len(ways) == len(LADDER))[1], looks[-1][0]
    assert here == there == 1 and then_s - now_s == pytest.approx(later_s)


def test_a_level_that_was_asked_for_is_not_put_off_again() -> None:
    """Guards: a token of the bucket each time that what keeps a level from being entered lets go, and takes hold."""
    policy, count = after_a_minute(1.0)
    assert policy.decide(replace(queue(1.7), num_arrivals=count)).level == 1
    assert policy.decide(replace(queue(0.1, now_s=100.3), num_arrivals=count)).level == 1


@pytest.mark.parametrize(("hold_s", "is_put_off"), [(60.0, False), (0.0, True)])
def test_limits_that_count_for_nothing_hold_up_nobody(hold_s: float, is_put_off: bool) -> None:
    """Guards: one client with a limit of its own that has everybody's levels entered early, and pays for none."""
    policy, count = after_a_minute(1.0, limits_hold_s=hold_s)
    strict = replace(queue(0.1), running_limits=(OwnLimit(0.1, 1),), num_arrivals=count)
    assert (policy.decide(strict).level == 0) is is_put_off


def test_a_tenth_more_than_is_served_is_not_served() -> None:
    """Guards: a load that is beyond level 0 by less than its averages scatter."""
    for rate, is_served in ((1.9, True), (2.2, False)):
        policy, _ = after_a_minute(rate, minutes=5)
        assert policy._forecast.is_served is is_served


@pytest.mark.parametrize(("way_s", "dwell_s"), [(0.01, 0.1), (0.4, 0.4), (3.0, 1.0)])
def test_the_way_back_takes_no_longer_than_what_was_waited_for_it(way_s: float, dwell_s: float) -> None:
    """Guards: a way of a second that a queue of a tenth of one turns round."""
    assert quick_dwell_s(1.0, way_s) == dwell_s


STRICT = (OwnLimit(0.1, 1),)  # a level keeps that


@pytest.mark.parametrize(
    ("rate", "fields", "dwell_s"),
    [(1.0, {}, 0.1), (3.0, {}, 1.0), (1.0, {"level": 0}, 1.0), (1.0, {"running_limits": STRICT}, 1.0)],
    ids=["served", "not served", "on its way", "a stricter promise"],
)
def test_a_shallower_level_comes_soon_where_level_zero_serves_the_load(
    rate: float, fields: dict[str, Any], dwell_s: float
) -> None:
    """Guards: a dwell as long as in an overload, where the level comes back at the next moment that asks for it."""
    policy, count = after_a_minute(rate)
    level_zero = []
    for tick in range(16):
        at = {"level": 1, "target_level": 1, "num_kv_blocks": LADDER[1].num_kv_blocks, "num_arrivals": count} | fields
        now = replace(QUIET, now_s=100.1 + tick / 10, num_running=1, used_kv_blocks=3, **at)
        if policy.decide(now).level == 0:
            level_zero.append(tick / 10)
    assert level_zero and dwell_s <= level_zero[0] <= dwell_s + 0.21


@pytest.mark.parametrize("num_running", [0, 6])
def test_the_next_queue_is_another(num_running: int) -> None:
    """Guards: what one queue might have lost counted against the next."""
    policy, count = after_a_minute(1.0)
    policy.decide(replace(queue(0.1), num_arrivals=count))
    assert policy._put_off._lost is not None
    some = {"num_running": num_running, "used_kv_blocks": 6 * num_running}
    policy.decide(replace(QUIET, now_s=100.3, num_arrivals=count, **some))
    assert policy._put_off._lost is None


def late(violations: float) -> Prediction:
    return Prediction(violations, 10.0, binds=True, last_wait_s=1.0, tpot_s=0.02)


def test_to_put_a_level_off_may_cost_what_the_level_does_and_no_more() -> None:
    """Guards: a level that is put off whoever is late for it, or taken at once although nobody would be."""
    terms = Terms(price=100.0, costs=(0.0, 0.01), tokens=500.0, quick_end=1, lasting=0)  # 5 nats, a twentieth of one

    def goes_on(now: float, later: list[float]) -> bool:
        return PutOff().may_go_on(terms, (0, 1), late(now), [late(each) for each in later], target=0.01)

    assert goes_on(0.01, [0.05]) and not goes_on(0.01, [0.07])
    assert goes_on(0.01, [0.5, 0.05]), "the next level would do"
    assert not goes_on(0.5, [0.5]), "none keeps the promise"


def test_looks_one_after_the_other_do_not_lose_more_than_one() -> None:
    """Guards: a queue that loses as much as the level costs between each two looks, as each begins anew."""
    terms = Terms(price=100.0, costs=(0.0, 0.01), tokens=500.0, quick_end=1, lasting=0)
    put_off = PutOff()
    goes_on = [put_off.may_go_on(terms, (0, 1), late(x), [late(x + 0.03)], 0.05) for x in (0.0, 0.02, 0.04, 0.06)]
    assert goes_on == [True, True, False, False]
    put_off.forget()
    assert put_off.may_go_on(terms, (0, 1), late(0.06), [late(0.09)], 0.05), "another queue"
