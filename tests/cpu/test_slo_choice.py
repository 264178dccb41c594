"""Which level the `slo` policy takes, by what is predicted of each: price, error, and what lasts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cpu.sim_world import CALIBRATION, SERVER, config
from cpu.test_slo_parts import LIMITS, QUIET

from morphserve.tools.sim.morphing import plan_ladder
from policies import Cohort, Ladder, Signals, SloConfig, SloPolicy, StepTimes
from policies.slo.choice import Terms, for_burst, lasting, quick_end
from policies.slo.predictor import Load, Prediction, Predictor, Typical
from policies.slo.times.level_times import CalibratedTimes

STEPS = [{"format": "w8", "layers_per_level": 5}, {"format": "w4", "layers_per_level": 10}]
SECTION = config().ladder.model_validate({"steps": STEPS, "expected_kl": {"w8": 0.0289, "w4": 0.3061}})
LADDER: Ladder = plan_ladder(config().model_copy(update={"ladder": SECTION}), SERVER, CALIBRATION, None)
ALL_W8 = 6
COSTS = [0.0, 0.01, 0.1]
CHEAP = Terms(100.0, COSTS, 1000.0, quick_end=1, lasting=0)


def predictor(times: StepTimes = CALIBRATION.times) -> Predictor:
    usable = [level.num_kv_blocks - 1 for level in LADDER]
    return Predictor(usable, CalibratedTimes(times.of_ladder(LADDER), times.move), LIMITS)


def load(signals: Signals = QUIET, rate: float = 0.0) -> Load:
    return Load(signals, Typical.of(signals, LIMITS), rate, 3.0, 2.0, 0.15, 0.3, 0.05, 1.0)


def late(*violations: float) -> list[Prediction]:
    return [Prediction(each, 50.0, True, 0.0, 0.05) for each in violations]


def test_what_a_request_is_worth_decides() -> None:
    """Guards: a level for which each request that it saves is paid more than the user gives."""
    assert CHEAP.best(late(0.3, 0.0, 0.0), 0.01) == 1, "10 nats for 30"
    assert CHEAP.best(late(0.05, 0.0, 0.0), 0.01) == 0
    assert replace(CHEAP, price=1000.0).best(late(0.05, 0.0, 0.0), 0.01) == 1
    assert replace(CHEAP, lasting=1).best(late(0.0, 0.0, 0.0), 0.01) == 1, "no shallower one keeps up"


def test_a_level_is_enough_where_no_deeper_one_could_pay_for_itself() -> None:
    """Guards: a promise that is broken where one looks no further, and a level that each burst must have."""
    few = Prediction(0.05, 50.0, True, 0.0, 0.05)
    assert CHEAP.is_enough(0, few, 0.01), "5 nats for 10"
    assert not replace(CHEAP, price=1000.0).is_enough(0, few, 0.01)
    assert not CHEAP.is_enough(0, replace(few, violations=0.6), 0.01), "60 nats for 10"
    assert not replace(CHEAP, price=1.0).is_enough(0, replace(few, violations=0.6), 0.01), "the promise is broken"
    assert not replace(CHEAP, lasting=1).is_enough(0, few, 0.01), "it does not keep up"
    assert replace(CHEAP, price=1000.0).is_enough(2, few, 0.01), "there is none"


def test_a_slower_level_must_save_more_than_the_error() -> None:
    """Guards: W4, ten times as dear as W8, for a difference that predictions cannot see."""
    assert CHEAP.best(late(20.0, 10.0, 2.0), 0.01) == 2
    assert CHEAP.best(late(20.0, 10.0, 6.0), 0.01) == 1, "most of them would be late there, too"
    assert CHEAP.best(late(20.0, 0.95, 0.0), 0.01) == 1, "not one request"
    assert replace(CHEAP, price=10.0).best(late(20.0, 10.0, 2.0), 0.01) == 1, "90 nats for 80"


def test_what_no_level_serves_gets_the_quickest_at_once() -> None:
    """Guards: one small level after the other while the queue grows."""
    terms = Terms(1.0, [0.0, 0.01, 0.02, 0.1], 1000.0, quick_end=2, lasting=0)
    assert terms.best(late(3.0, 2.9, 2.9, 2.9), 0.01) == 2
    assert terms.best(late(0.4, 0.4, 0.4, 0.4), 0.01) == 0, "the promise is kept"


def test_a_way_that_makes_more_late_is_not_taken() -> None:
    """Guards: minutes of switching large layers, a step with each, for the one request that runs and may be in time."""
    terms = Terms(300.0, [0.0, 0.01, 0.02, 0.1], 10.0, quick_end=2, lasting=0)

    def best(*shares: float) -> int:
        return terms.best([replace(each, requests=1.0) for each in late(*shares)], 0.01)

    assert best(0.27, 0.6, 0.92, 0.95) == 0
    assert best(0.27, 0.2, 0.92, 0.95) == 1, "the one that saves most"
    assert best(0.6, 0.6, 0.92, 0.95) == 2, "within the error"


def test_levels_are_quick_as_far_as_each_computes_as_fast() -> None:
    """Guards: W4, whose steps are slower with many sequences, taken at once in a burst."""
    assert quick_end(predictor(), load(), len(LADDER)) == ALL_W8
    slow = replace(CALIBRATION.times.formats["w8"], per_seq_s=0.01)
    times = replace(CALIBRATION.times, formats=CALIBRATION.times.formats | {"w8": slow})
    assert quick_end(predictor(times), load(), len(LADDER)) == 0


def test_scatter_of_measured_factors_does_not_end_them() -> None:
    """Guards: a level of W8 that was measured a thousandth slower than the one before, so that no deeper one counts."""
    noisy = replace(CALIBRATION.times.formats["base"], per_seq_s=CALIBRATION.times.formats["base"].per_seq_s * 1.001)
    times = replace(CALIBRATION.times, formats=CALIBRATION.times.formats | {"w8": noisy})
    assert quick_end(predictor(times), load(), len(LADDER)) >= ALL_W8


def test_compute_that_does_not_keep_up_asks_for_a_quicker_level() -> None:
    """Guards: a queue that grows for a minute at a level whose steps are too slow, each second of it looking well."""
    made = predictor()
    assert lasting(made, load(), 1.0, ALL_W8) == 0
    assert lasting(made, load(), 1000.0, ALL_W8) == ALL_W8
    rates = [rate / 10 for rate in range(1, 200)]
    found = [lasting(made, load(), rate, ALL_W8) for rate in rates]
    assert found == sorted(found) and set(found) == set(range(ALL_W8 + 1))
    tpot_s = [made.lasting_tpot_s(0, load(), rate) for rate in (0.0, 1.0, 1000.0)]
    assert lasting(made, replace(load(), tpot_s=0.99 * tpot_s[1]), 1.0, ALL_W8) > 0, "it keeps up, and is late"
    assert tpot_s == [pytest.approx(0.012), pytest.approx(tpot_s[1]), float("inf")] and tpot_s[1] > 0.012


def test_the_rate_that_a_level_serves_for_long_is_of_compute_or_of_kv() -> None:
    """Guards: a burst measured against more than KV lets run, or than steps keep up with in time."""
    made = predictor()
    by_kv = made.lasting_rate(0, load())
    assert by_kv == made.release_rate(0, load())
    strict = replace(load(), tpot_s=0.016)
    by_compute = made.lasting_rate(0, strict)
    assert by_compute < by_kv and made.lasting_tpot_s(0, strict, by_compute) == pytest.approx(0.016)
    assert made.lasting_rate(0, replace(load(), tpot_s=0.001)) == 0.0


def test_a_burst_beyond_level_zero_gets_the_quick_format_before_anybody_is_late() -> None:
    """Guards: a crowd that is let in at level 0 in the first seconds of a burst, and is there at its peak."""
    seen = replace(QUIET, used_kv_blocks=30, num_running=6, step_s=0.02)
    levels = []
    for arrivals in (1, 24):
        policy = SloPolicy(SloConfig(kind="slo"), LADDER, CALIBRATION.times, LIMITS)
        for tick in range(8):
            signals = replace(seen, now_s=100.0 + 0.26 * tick, num_arrivals=arrivals * tick // 7)
            level = policy.decide(signals).level
        levels.append(level)
        assert policy._forecast.is_burst == (arrivals > 1)
    assert levels == [0, ALL_W8]


def test_a_burst_gets_the_shallowest_level_that_serves_it_and_its_peak() -> None:
    """Guards: all of the quick format for a load that the first of it serves, and little of it for what grows yet."""
    made, now = predictor(), load()
    served = [made.served_rate(level, now) for level in range(ALL_W8 + 1)]
    assert served == sorted(served)
    levels = [for_burst(made, now, share * served[0] / 1.2, ALL_W8) for share in (0.5, 0.99, 1.01, 99.0)]
    assert levels == [0, 0, 1, ALL_W8]
    assert for_burst(made, now, 1.01 * served[1] / 1.2, ALL_W8) == 2


def test_what_is_free_serves_a_burst_too_until_it_is_taken() -> None:
    """Guards: levels for the first seconds of a burst that an empty KV cache holds to its end; seats counted that
    those who wait take; a rate that compute does not keep up with, since there are blocks for it."""
    made, seen = predictor(), replace(QUIET, used_kv_blocks=0, num_running=0)
    empty = replace(load(), signals=seen)
    full = replace(empty, signals=replace(seen, used_kv_blocks=48, num_running=int(made._fits(48, empty))))
    lasting = made.lasting_rate(0, empty)
    rates = [made.served_rate(0, replace(empty, horizon_s=seconds)) for seconds in (1.0, 3.0, 60.0)]
    assert rates[0] > 1.5 * rates[1] > 1.5 * lasting and rates[2] == pytest.approx(lasting)
    assert made.served_rate(0, full) == pytest.approx(made.lasting_rate(0, full), rel=0.05)
    waited_for = replace(empty, signals=replace(seen, num_waiting=2))
    assert lasting < made.served_rate(0, waited_for) < made.served_rate(0, empty)
    crowd = replace(full, signals=replace(full.signals, num_waiting=99))
    assert made.served_rate(0, crowd) == 0.0 and for_burst(made, crowd, 0.1, ALL_W8) > 0
    strict = replace(empty, horizon_s=0.1, tpot_s=0.016)
    assert made.served_rate(0, strict) == made.lasting_rate(0, strict)


def test_who_comes_is_judged_by_time_per_token_too() -> None:
    """Guards: a level that lets in a crowd whose tokens are all late, praised for its short queue."""
    slow = {fmt: replace(time, per_seq_s=0.01) for fmt, time in CALIBRATION.times.formats.items()}
    times = replace(CALIBRATION.times, formats=slow)
    waiting = (Cohort(30, 1920, 99.9, 99.9),)
    crowd = replace(QUIET, num_running=4, used_kv_blocks=16, num_waiting=30, waiting=waiting, output_tokens=64.0)
    few, many = (predictor(times).predict(level, load(crowd), 0.0) for level in (0, ALL_W8))
    assert few.tpot_s < 0.15 < many.tpot_s
    assert many.violations > 29


def test_a_burst_goes_to_all_of_the_quick_format_at_once() -> None:
    """Guards: six transitions in a burst, the quickest level last."""
    policy = SloPolicy(SloConfig(kind="slo"), LADDER, CALIBRATION.times, LIMITS)
    waiting = (Cohort(200, 12_800, 98.2, 99.9),)
    blocks = LADDER[0].num_kv_blocks
    burst = replace(
        QUIET, used_kv_blocks=blocks - 1, num_waiting=200, num_running=8, oldest_wait_s=1.8, waiting=waiting,
        step_s=0.02,
    )  # fmt: skip
    assert policy.decide(burst).level == ALL_W8
