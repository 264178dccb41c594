"""How long the way to a level keeps whom waiting: those alone who do not fit where the engine is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policies import Cohort, EngineLimits, Signals, StepTime
from policies.slo.predictor import Load, Prediction, Predictor, Typical
from policies.slo.times import CalibratedTimes
from policies.step_times import LayerMove

pytestmark = pytest.mark.cpu

USABLE = (2560, 5632)
TIME = StepTime(0.004, 1e-5, 2.2e-5, 3e-8)
LIMITS = EngineLimits(16, 256, 8192, moves_beside_steps=True)
DELAY_S, PROMISED_S = 3.0, 2.0
SIGNALS = Signals(
    now_s=100.0, level=0, target_level=0, num_kv_blocks=2560, used_kv_blocks=900, num_waiting=1, num_running=10,
    oldest_wait_s=0.0, preemptions=0, preemption_rate=0.0, arrival_rate=0.0, queue_delay_s=0.0, ttft_s=0.0, tpot_s=0.0,
    step_s=0.006, blocks_per_request=80.0, prompt_tokens=1132.0, output_tokens=273.0,
    waiting=(Cohort(1, 1132, 100.0, 100.0),),
)  # fmt: skip


def predicted(of: int, arrival_rate: float = 0.0, horizon_s: float = 1.0, **changes: int) -> Prediction:
    signals = replace(SIGNALS, **changes)
    predictor = Predictor(USABLE, CalibratedTimes([TIME, TIME], LayerMove(0.1, 0.1)), LIMITS)
    typical = Typical.of(signals, LIMITS)
    load = Load(signals, typical, arrival_rate, horizon_s, PROMISED_S, 0.5, 0.1, 0.05, 1.0)
    return predictor.predict(of, load, DELAY_S)


def test_who_fits_where_the_engine_is_does_not_wait_for_another_level() -> None:
    """Guards: deeper levels that seem to help nobody, where the way there takes as long as the promise."""
    fits = predicted(1)
    assert fits.last_wait_s < 0.1
    assert fits.violations < 0.01


def test_who_does_not_fit_waits_for_the_way() -> None:
    """Guards: the way to a level that costs nobody anything."""
    full = {"used_kv_blocks": 2560, "num_running": 30}
    assert predicted(1, **full).last_wait_s > DELAY_S
    assert predicted(1, **full).violations > 0.9
    assert predicted(1, **full, level=1, target_level=1).last_wait_s < 0.1, "it is there"


def test_a_level_that_holds_less_does_not_let_in_by_the_room_of_today() -> None:
    """Guards: a way back that seems to keep nobody waiting, while blocks go."""
    full = {"used_kv_blocks": 2600, "num_running": 30, "num_kv_blocks": 5632, "level": 1, "target_level": 1}
    assert predicted(0, **full).last_wait_s > DELAY_S


def test_who_comes_while_there_is_room_does_not_wait_either() -> None:
    """Guards: a forecast in which everybody who comes before the level does is late."""
    few, many = (predicted(1, rate, num_waiting=0) for rate in (5.0, 60.0))
    assert few.violations / few.requests < 0.05
    assert many.violations / many.requests > 0.2
