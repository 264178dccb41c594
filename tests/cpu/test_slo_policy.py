"""The `slo` policy on simulated traffic: quiet times, bursts, other machines, and what it costs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from morphserve.tools.sim import SimServer, Simulated, simulate
from morphserve.tools.sim.morphing import plan_ladder
from morphserve.tools.workload.metrics import Slo
from morphserve.tools.workload.timeline import level_zero_after_s
from morphserve.tools.workload.workload import Workload
from policies import EngineLimits, Ladder, SloConfig, SloPolicy, StepTime, build_policy
from policies.slo.choice import Terms
from policies.slo.predictor import Predictor
from policies.slo.targets import fill_in
from tests.cpu.sim_world import CALIBRATION, SERVER, config, workload

LIMITS = EngineLimits(32, 64, 2048)
SLO: dict[str, Any] = {"kind": "slo"}
THRESHOLD = {"kind": "threshold", "degrade_above": 0.8, "target_usage": 0.45, "restore_below": 0.6}
Arrivals = list[tuple[float, int, int]]


def poisson(rate: float, start_s: float, seconds: float, rng: random.Random) -> Arrivals:
    """Requests of usual length."""
    out, at = [], start_s
    while (at := at + rng.expovariate(rate)) < start_s + seconds:
        prompt, output = int(rng.lognormvariate(4.0, 0.7)), int(rng.lognormvariate(4.6, 0.6))
        out.append((at, min(max(prompt, 8), 200), min(max(output, 8), 250)))
    return out


def bursts(count: int, gap_s: float, seed: int, rate: float = 9.0, seconds: float = 6.0) -> Workload:
    """Back to back, with light traffic between them."""
    rng = random.Random(seed)
    made = poisson(0.7, 0.0, count * (gap_s + seconds) + 20, rng)
    for number in range(count):
        made += poisson(rate, 5 + number * (gap_s + seconds), seconds, rng)
    return workload(sorted(made))


def run(load: Workload, policy: dict[str, Any] | None, server: SimServer = SERVER, **kwargs: Any) -> Simulated:
    """Where the policy predicts, from calibrated step times: test_slo_learned.py has those that are learned."""
    known = None if policy is None else config(**policy).model_copy(update={"step_times": Path("times.json")})
    return simulate(load, server, known, CALIBRATION, **kwargs)


def violations(result: Simulated) -> float:
    return result.violation_rate(Slo())


@pytest.mark.parametrize("seed", range(20))
def test_steady_light_traffic_enters_nothing(seed: int) -> None:
    """Guards: quality given away for a load that full precision serves."""
    result = run(workload(poisson(1.2, 0.0, 60.0, random.Random(seed))), SLO, seed=seed)
    assert result.transitions == 0 and violations(result) == 0


@pytest.mark.parametrize("seed", range(3))
def test_levels_that_nobody_predicts_would_change_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a deeper level that is not looked at, and would have been taken; or is looked at each time."""
    predicted, outlook = [0], Predictor._outlook

    def counted(*args: Any) -> Any:
        predicted[-1] += 1
        return outlook(*args)

    monkeypatch.setattr(Predictor, "_outlook", counted)
    load = bursts(3, 20.0, seed)
    quick = run(load, SLO, seed=seed)
    predicted.append(0)
    monkeypatch.setattr(Terms, "is_enough", lambda *_: False)
    all_looked_at = run(load, SLO, seed=seed)
    assert quick.transitions > 0 and quick.schedule == all_looked_at.schedule
    assert predicted[-2] < 0.8 * predicted[-1]


@pytest.mark.parametrize("seed", range(15))
def test_a_draining_tail_enters_nothing(seed: int) -> None:
    """Guards: a level entered for requests that end anyway: nobody comes after them."""
    rng = random.Random(seed)
    tail = [(0.05 * i, rng.randint(20, 60), rng.randint(150, 220)) for i in range(7)]
    result = run(workload(tail), SLO, seed=seed)
    assert result.transitions == 0 and violations(result) == 0


@pytest.mark.parametrize("seed", range(15))
def test_long_prompts_that_wait_for_compute_enter_nothing_slower(seed: int) -> None:
    """Guards: a queue that waits for prefill taken for one that waits for KV; W8 computes faster, W4 does not."""
    rng, at, made = random.Random(seed), 0.0, []
    for _ in range(60):
        at += rng.expovariate(2.6)
        made.append((at, rng.randint(900, 2000), rng.randint(5, 20)))
    server = SimServer(num_blocks=1500, block_size=32, max_model_len=4096)
    load = workload(made)
    result = run(load, SLO, server, seed=seed)
    assert {level for level, tokens in result.tokens_by_level.items() if tokens} <= {"0", "1"}
    assert violations(result) <= violations(run(load, None, server, seed=seed))


@pytest.mark.parametrize("seed", range(4))
def test_bursts_cost_less_than_thresholds_and_save_as_many(seed: int) -> None:
    """Guards: the policy that predicts is no better than the one that looks."""
    load = bursts(3, 20.0, seed)
    stock, threshold, slo = run(load, None), run(load, THRESHOLD), run(load, SLO)
    assert violations(stock) > 0.2
    assert violations(slo) <= violations(threshold) + 0.01
    assert (slo.expected_kl_per_token or 0) < (threshold.expected_kl_per_token or 0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gap_s", [2.0, 6.0, 12.0])
def test_back_to_back_bursts_do_not_make_it_swing(seed: int, gap_s: float) -> None:
    """Guards: in and out for each burst, and more changes than the bucket holds."""
    result = run(bursts(6, gap_s, seed), SLO)
    minutes = 6 * (gap_s + 6.0) / 60
    assert result.transitions <= 2 * 6 + 2
    assert result.transitions <= 20 / 3 + 20 * minutes + 1


@pytest.mark.parametrize("seed", range(4))
def test_level_zero_comes_back_within_ten_seconds(seed: int) -> None:
    """Guards: quality that is paid for long after the burst."""
    result = run(bursts(1, 20.0, seed), SLO)
    assert result.transitions >= 2
    after_s = level_zero_after_s(result.series, SERVER.num_blocks)
    assert after_s is not None and after_s < 10.0


@pytest.mark.parametrize("speed", [0.6, 1.0, 1.7])
def test_a_machine_that_is_not_the_calibrated_one(speed: float) -> None:
    """Guards: predictions that only hold where the calibration was made."""
    load = bursts(2, 20.0, 7)
    stock, slo, w8 = (run(load, policy, speed=speed) for policy in (None, SLO, {"kind": "static", "level": "w8"}))
    assert violations(slo) <= max(violations(w8) + 0.05, 0.02) and violations(slo) <= violations(stock)


def test_the_same_signals_give_the_same_answers() -> None:
    """Guards: a decision that cannot be replayed."""
    first, second = run(bursts(2, 9.0, 3), SLO), run(bursts(2, 9.0, 3), SLO)
    assert first.tokens_by_level == second.tokens_by_level and first.ends == second.ends


def test_a_spent_budget_means_full_precision() -> None:
    """Guards: a quality budget that is only reported."""
    load = bursts(3, 10.0, 1)
    free, bound = run(load, SLO), run(load, {**SLO, "quality_budget": 40.0})
    none = run(load, {**SLO, "quality_budget": 0.0})
    spent = sum(n * 0.0289 for level, n in bound.tokens_by_level.items() if level == "1")
    assert none.transitions == 0 and set(none.tokens_by_level) == {"0"}
    assert spent < sum(n * 0.0289 for level, n in free.tokens_by_level.items() if level == "1")
    assert spent < 40.0 * 1.5, "what a drain takes is beyond the budget, and little"


def test_the_modes_order_cost_and_violations() -> None:
    """Guards: presets that do not do what their names say."""
    costs, late = [], []
    for mode in ("accuracy", "default", "performance"):
        results = [run(bursts(3, 15.0, seed), {**SLO, "mode": mode}) for seed in range(3)]
        costs.append(sum(result.expected_kl_per_token or 0 for result in results))
        late.append(sum(violations(result) for result in results))
    assert costs == sorted(costs) and late[0] >= late[2]


def test_shedding_keeps_the_promise_to_those_who_are_let_in() -> None:
    """Guards: an overload that no level can serve, in which everybody is late; and a door that never opens again."""
    rng = random.Random(4)
    made = poisson(0.7, 0.0, 60.0, rng) + poisson(40.0, 5.0, 10.0, rng)
    load = workload(sorted(made))
    open_door, shed = run(load, SLO), run(load, {**SLO, "shed": True})
    assert not open_door.refused and len(shed.refused) > 50
    answered = [outcome for outcome in shed.outcomes if outcome.ok]
    late = sum(outcome.ttft_s > 2.0 for outcome in answered) / len(answered)
    assert late < 0.7 * violations(open_door)
    assert violations(shed) < violations(open_door), "more are served in time although fewer are let in"
    assert max(request.arrival_s for request in shed.refused) < 30.0


def test_nobody_is_refused_while_a_level_can_serve() -> None:
    """Guards: requests that are turned away from a server that could have answered."""
    assert not run(bursts(3, 20.0, 0), {**SLO, "shed": True}).refused


def ladder() -> Ladder:
    return plan_ladder(config(), SERVER, CALIBRATION, None)


def test_accuracy_stays_within_eight_bits() -> None:
    """Guards: mode accuracy in W4."""
    targets = fill_in(SloConfig(kind="slo", mode="accuracy"), ladder())
    assert ladder()[targets.max_level].formats <= {"base", "w8"}


def test_without_limits_it_says_what_to_do() -> None:
    """Guards: an AttributeError in the first burst."""
    with pytest.raises(ValueError, match="kind threshold"):
        build_policy(SloConfig(kind="slo"), ladder(), CALIBRATION.times, None)


def test_lost_trust_hands_over_to_thresholds_and_comes_back() -> None:
    """Guards: decisions on predictions that have been wrong all along."""
    policy = SloPolicy(SloConfig(kind="slo"), ladder(), CALIBRATION.times, LIMITS)
    policy.correction._wait_square = 2.0
    policy._weigh_trust()
    assert policy.distrusts
    policy.correction._wait_square = 0.5
    policy._weigh_trust()
    assert policy.distrusts, "hysteresis"
    policy.correction._wait_square = 0.1
    policy._weigh_trust()
    assert not policy.distrusts


def test_an_uncalibrated_ladder_is_refused() -> None:
    """Guards: a KeyError in the first burst."""
    from dataclasses import replace

    only_base = replace(CALIBRATION.times, formats={"base": StepTime(0.01, 0.0, 0.0, 0.0)})
    with pytest.raises(ValueError, match="'w8' are not known"):
        SloPolicy(SloConfig(kind="slo"), ladder(), only_base, LIMITS)
