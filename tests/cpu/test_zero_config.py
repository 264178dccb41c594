"""What a user gets who writes nothing: on four loads, from heavy to light, as good as with a calibration."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from morphserve.config import MorphServeConfig, load_config
from morphserve.tools.sim import SimServer, Simulated, load_calibration, simulate
from morphserve.tools.workload import Slo, WorkloadSpec, load_workload

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
TIMES = ROOT / "docs/results/step_times.json"
# Requests per second of every 5th to every 8th request of the Azure conversation trace, in half an hour.
RATES = (1.12, 0.94, 0.80, 0.70)
MADE = "synthetic:3,duration=300,rate={rate},cv=1.2,burst=2,burst_s=20,calm_s=40"  # five minutes of the like


def demo(**changes: object) -> MorphServeConfig:
    """The demo's settings without what was prepared for its model: no order, no levels, no step times."""
    return load_config(ROOT / "policies/yaml/demo.yaml").model_copy(update={"prepared": False, **changes})


@cache
def run(rate: float, config: str) -> Simulated:
    calibration = load_calibration(TIMES)
    spec = WorkloadSpec(Path(MADE.format(rate=rate)), input_clip=(8, 120), output_clip=(4, 384))
    server = SimServer(num_blocks=49, block_size=32, max_model_len=512, step_noise=calibration.times.scatter)
    settings = {"stock": None, "learned": demo(), "calibrated": demo(step_times=TIMES)}[config]
    return simulate(load_workload(spec), server, settings, calibration)


def nats(rate: float, config: str) -> float:
    found = run(rate, config).expected_kl_per_token
    assert found is not None
    return found


@pytest.mark.parametrize("rate", RATES)
def test_nobody_is_late(rate: float) -> None:
    """Guards: defaults under which a load that can be served is not; one request in a thousand may be late."""
    assert run(rate, "learned").violation_rate(Slo()) <= 0.001


def test_the_heavy_loads_hurt_a_stock_server() -> None:
    """Guards: loads that would be served in time by anything."""
    assert min(run(rate, "stock").violation_rate(Slo()) for rate in RATES[:2]) > 0.02


def test_it_costs_what_it_costs_with_a_calibration() -> None:
    """Guards: step times learned so late, or so wrong, that quality is paid for nothing."""
    assert sum(nats(rate, "learned") for rate in RATES) <= 1.1 * sum(nats(rate, "calibrated") for rate in RATES)


def test_a_light_load_costs_next_to_nothing() -> None:
    """Guards: a default that degrades where full precision would have done."""
    assert nats(RATES[-1], "learned") <= 0.0005
