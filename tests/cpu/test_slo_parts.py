"""Forecast, correction, budgets: the parts of the `slo` policy, one by one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from policies import Cohort, EngineLimits, LayerMove, OwnLimit, Signals, StepLoad, StepTime
from policies.slo.forecast import ArrivalForecast
from policies.slo.limits import QualityBudget, TokenBucket
from policies.slo.predictor import Load, Predictor, Typical
from policies.slo.times.correction import Correction
from policies.slo.times.level_times import CalibratedTimes


def times(*levels: StepTime) -> CalibratedTimes:
    """Each level's, as calibrated."""
    return CalibratedTimes(levels, LayerMove(0.004, 0.008))


TIMES = times(StepTime(0.012, 4e-4, 2.5e-4, 1.2e-6), StepTime(0.007, 3e-4, 1.5e-4, 1.2e-6))
LIMITS = EngineLimits(block_size=32, max_num_seqs=64, max_num_batched_tokens=2048)
QUIET = Signals(
    now_s=100.0, level=0, target_level=0, num_kv_blocks=49, used_kv_blocks=0, num_waiting=0, num_running=0,
    oldest_wait_s=0.0, preemptions=0, preemption_rate=0.0, arrival_rate=0.0, queue_delay_s=0.0, ttft_s=0.0, tpot_s=0.0,
    step_s=0.0, blocks_per_request=6.0, prompt_tokens=64.0, output_tokens=128.0,
)  # fmt: skip


def feed(
    forecast: ArrivalForecast, rate: float, start_s: float, seconds: float, count: int, seed: int = 0,
    served: float = 0.0,
) -> int:
    """Poisson arrivals; returns the count since start."""
    rng = random.Random(seed)
    now, next_s = start_s, start_s + (rng.expovariate(rate) if rate else 1e9)
    while now < start_s + seconds:
        now += 0.02
        while next_s <= now:
            count += 1
            next_s += rng.expovariate(rate)
        forecast.update(now, count, served)
    return count


@pytest.mark.parametrize("hour_before", [False, True])
def test_what_level_zero_serves_with_ease_is_no_burst(hour_before: bool) -> None:
    """Guards: all of 8 bits for a light load, because nothing came before it."""
    bursts = 0
    for seed in range(20):
        forecast = ArrivalForecast()
        if hour_before:
            forecast.update(-3600.0, 0)
        count = 0
        for part in range(20):
            count = feed(forecast, 1.0, float(part), 1.0, count, 100 * seed + part, served=4.0)
            bursts += forecast.is_burst
    assert bursts <= 4, "of 400 seconds"


def test_what_level_zero_cannot_serve_is_a_burst_and_over_soon_after() -> None:
    """Guards: a burst that is seen once KV is full, and one that holds a level for as long again as it lasted."""
    forecast = ArrivalForecast()
    count = feed(forecast, 12.0, 0.0, 2.0, 0, 1, served=4.0)
    assert forecast.is_burst, "nobody knows what is usual, but this is too much"
    count = feed(forecast, 12.0, 2.0, 6.0, count, 2, served=4.0)
    assert forecast.is_burst
    feed(forecast, 0.7, 8.0, 5.0, count, 3, served=4.0)
    assert not forecast.is_burst


@pytest.mark.parametrize("seed", range(8))
def test_steady_traffic_is_no_burst(seed: int) -> None:
    """Guards: an alarm out of noise, and so a level that is entered for nothing."""
    forecast = ArrivalForecast()
    count = feed(forecast, 2.0, 0.0, 30.0, 0, seed)
    alarms = 0
    for part in range(20):
        count = feed(forecast, 2.0, 30.0 + part, 1.0, count, 100 * seed + part)
        alarms += forecast.alarm
    assert alarms <= 4 and forecast.rate(3.0) == pytest.approx(2.0, abs=1.2)


def test_a_burst_is_seen_within_a_second_and_forgotten_after_it() -> None:
    """Guards: a forecast that still says 2/s while 10/s come, or 10/s long after they came."""
    forecast = ArrivalForecast()
    count = feed(forecast, 2.0, 0.0, 30.0, 0)
    count = feed(forecast, 10.0, 30.0, 1.0, count, 1)
    assert forecast.alarm and forecast.rate(3.0) > 5.0
    count = feed(forecast, 10.0, 31.0, 5.0, count, 2)
    assert 6.0 < forecast.rate(3.0) < 20.0
    feed(forecast, 1.0, 36.0, 20.0, count, 3)
    assert not forecast.alarm and forecast.rate(3.0) < 4.0


def test_an_hour_of_silence_costs_one_update() -> None:
    """Guards: work, or a memory, in proportion to idle time."""
    forecast = ArrivalForecast()
    count = feed(forecast, 5.0, 0.0, 20.0, 0)
    forecast.update(3620.0, count)
    assert forecast.rate(3.0) < 0.1


def test_the_first_seconds_count_as_they_are() -> None:
    """Guards: traffic that begins taken for a fifth of what it is, for a quarter of a minute."""
    forecast = ArrivalForecast()
    feed(forecast, 1.7, 0.0, 6.0, 0)
    assert forecast.slow == pytest.approx(1.7, abs=0.8)
    lone = ArrivalForecast()
    lone.update(0.0, 0)
    lone.update(0.3, 1)
    assert lone.slow < 0.5, "one request is not three a second"


def test_a_rate_that_grows_fourfold_is_seen_where_few_come() -> None:
    """Guards: an alarm in standard deviations of a quarter second, which 1.6 a second after 0.4 never raises."""
    alarms = 0
    for seed in range(20):
        forecast = ArrivalForecast()
        count = feed(forecast, 0.4, 0.0, 60.0, 0, seed)
        feed(forecast, 1.6, 60.0, 8.0, count, 100 + seed)
        alarms += forecast.alarm
    assert alarms >= 10, "it ends when the slow average has come as far"


def steps(correction: Correction, factor: float, count: int, noise: float = 0.0) -> None:
    rng = random.Random(1)
    for number in range(count):
        seconds = TIMES[0].seconds(8, 0, 800) * factor * rng.lognormvariate(0, noise)
        correction.learn(replace(QUIET, now_s=100.0 + number, last_step=StepLoad(seconds, 8, 0, 800, 0)))


def test_a_slower_machine_is_learnt() -> None:
    """Guards: predictions of the machine that was calibrated, on one that is half as fast."""
    correction = Correction(TIMES, 2.0)
    steps(correction, 2.0, 600)
    assert correction.factor == pytest.approx(2.0, rel=0.1)


def test_a_step_is_learnt_once() -> None:
    """Guards: one slow step that counts at every boundary until the next."""
    once, often = Correction(TIMES, 2.0), Correction(TIMES, 2.0)
    slow = replace(QUIET, last_step=StepLoad(0.2, 8, 0, 800, 0))
    after = replace(QUIET, last_step=StepLoad(0.02, 8, 0, 800, 0))  # a step is judged once the next is there
    for correction, count in ((once, 1), (often, 50)):
        for _ in range(count):
            correction.learn(slow)
        correction.learn(after)
    assert often.factor == once.factor > 1.05


def test_the_error_is_admitted() -> None:
    """Guards: sure predictions on a machine whose steps scatter."""
    calm, wild = Correction(TIMES, 2.0), Correction(TIMES, 2.0)
    steps(calm, 1.0, 600)
    steps(wild, 1.0, 600, noise=0.5)
    assert calm.step_sigma < 0.05 < 0.3 < wild.step_sigma


def test_a_wrong_wait_is_admitted() -> None:
    """Guards: predicted waits that never are compared with what came."""
    correction = Correction(TIMES, 2.0)
    before = correction.sigma
    for number in range(20):
        now = 100.0 + 10 * number
        cohort = Cohort(3, 90, now, now)
        correction.watch(cohort, now + 1.0)
        correction.learn(replace(QUIET, now_s=now + 1.0, waiting=(cohort,)))
        correction.learn(replace(QUIET, now_s=now + 6.0, waiting=()))
    assert correction.sigma > 2 * before


def test_changes_are_bounded_by_the_bucket() -> None:
    """Guards: a level that changes more often than the user allows."""
    bucket, changes = TokenBucket(6.0), 0
    for second in range(600):
        bucket.refill(float(second))
        if bucket.level >= 1:
            bucket.take()
            changes += 1
    assert changes == pytest.approx(60 + bucket.capacity, abs=2)


def test_a_spent_budget_comes_back_with_time() -> None:
    """Guards: a quality budget that is a wish, or that is lost for good."""
    budget = QualityBudget(36.0)
    for second in range(100):
        budget.update(float(second), 50, 0.02)
        if budget.exhausted:
            break
    assert budget.exhausted and 30 < second < 40
    budget.update(second + 100.0, 0, 0.0)
    assert budget.exhausted, "a hundredth of an hour is not enough to begin again"
    budget.update(second + 600.0, 0, 0.0)
    assert not budget.exhausted
    assert QualityBudget(None).exhausted is False


def load(signals: Signals, rate: float = 0.0) -> Load:
    return Load(signals, Typical.of(signals, LIMITS), rate, 3.0, 2.0, 0.15, 0.3, 0.05, 1.0)


PREDICTOR = Predictor((48, 150), TIMES, LIMITS)
PACKED = replace(QUIET, num_running=10, used_kv_blocks=46, num_waiting=12, waiting=(Cohort(12, 768, 98.9, 99.6),))


def test_more_blocks_save_who_waits() -> None:
    """Guards: a prediction that sees no use in a deeper level while the queue waits for KV."""
    here, deeper = (PREDICTOR.predict(level, load(PACKED), 0.1) for level in (0, 1))
    assert here.binds and here.violations > 6
    assert deeper.violations < 1


def test_who_is_lost_is_no_reason() -> None:
    """Guards: degrading for requests whose promise is broken already, as if they could be saved."""
    lost = replace(PACKED, waiting=(Cohort(12, 768, 80.0, 90.0),))
    assert PREDICTOR.predict(0, load(lost), 0.0).violations < 12 * 0.3


def test_a_limit_of_its_own_counts() -> None:
    """Guards: a request's own promise ignored."""
    strict = replace(PACKED, num_running=4, used_kv_blocks=48, waiting=(Cohort(4, 256, 99.9, 99.9, ttft_s=0.15),))
    relaxed = replace(strict, waiting=(Cohort(4, 256, 99.9, 99.9, ttft_s=60.0),))
    slow, fast = PREDICTOR.compare([(0, 0.2), (1, 0.0)], load(strict)).promised
    assert slow.violations > 3 > fast.violations
    assert PREDICTOR.predict(0, load(relaxed), 0.2).violations < 0.1


def test_prefill_that_waits_for_compute_does_not_bind_kv() -> None:
    """Guards: long prompts on an empty KV cache taken for a lack of KV."""
    s = replace(
        QUIET, num_kv_blocks=2000, num_running=4, used_kv_blocks=250, num_waiting=4, prompt_tokens=2000.0,
        output_tokens=13.0, blocks_per_request=63.0, waiting=(Cohort(4, 8000, 98.0, 99.5),),
    )  # fmt: skip
    assert not Predictor((1999, 4000), TIMES, LIMITS).predict(0, load(s, 1.0), 0.0).binds


def test_cost_depends_on_cohorts_not_on_requests() -> None:
    """Guards: predictions that walk the queue."""
    many = replace(PACKED, num_waiting=10_000, waiting=(Cohort(10_000, 640_000, 90.0, 99.6),))
    assert PREDICTOR.predict(0, load(many), 0.0).violations > 1000


def test_long_answers_at_the_end_of_a_burst_take_more_room() -> None:
    """Guards: seats counted in usual requests, while those that are left hold three times as much."""
    young, old = (replace(QUIET, num_running=20, used_kv_blocks=used) for used in (40, 240))
    assert Typical.of(young, LIMITS).mean_blocks == pytest.approx(Typical.of(QUIET, LIMITS).mean_blocks)
    assert Typical.of(old, LIMITS).mean_blocks > 10
    lone = replace(QUIET, num_running=1, used_kv_blocks=12)
    assert Typical.of(lone, LIMITS).mean_blocks < 7, "one request says little"


def test_a_slow_level_pays_for_those_it_would_lose() -> None:
    """Guards: requests that only a slow level cannot save counted as lost anyway, which makes it look good."""
    late_soon = replace(PACKED, step_s=0.02, waiting=(Cohort(12, 768, 98.1, 98.2),))
    slow = StepTime(5.0, 0.01, 0.001, 0.0)
    assert Predictor((150,), times(slow), LIMITS).predict(0, load(late_soon), 0.0).requests == pytest.approx(12 + 10)
    preempted = replace(late_soon, tpot_s=0.05, waiting=(Cohort(12, 768, 98.1, 98.2, has_token=True),))
    assert Predictor((150,), times(slow), LIMITS).predict(0, load(preempted), 0.0).requests == pytest.approx(12 + 10)


def test_limits_of_more_than_run_speak_for_those_that_run() -> None:
    """Guards: a step that has ended requests whose limits still make up for others."""
    s = replace(QUIET, num_running=2, used_kv_blocks=8, running_limits=(OwnLimit(60.0, 5),))
    found = Predictor((150,), times(StepTime(5.0, 0.01, 0.001, 0.0)), LIMITS).predict(0, load(s), 0.0)
    assert (found.violations, found.requests) == pytest.approx((0, 2))
