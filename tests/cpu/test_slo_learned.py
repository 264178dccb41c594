"""The default policy without any calibration: careful at first, then as good as with one, on any engine."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cpu.log_world import LADDER, LEARNED, LIMITS, SLO, THRESHOLD, ask, load, patient, write
from cpu.sim_world import CALIBRATION, SERVER, config, workload
from cpu.test_slo_policy import bursts, poisson

from morphserve.config import MorphServeConfig, parse_config
from morphserve.control import DecisionLog, make_header
from morphserve.control.decisions.replay_log import replay
from morphserve.tools.sim import Calibration, Simulated, simulate
from morphserve.tools.workload.metrics import Slo
from morphserve.tools.workload.workload import Workload
from policies import (
    Cohort,
    LayerMove,
    PolicySetup,
    SloConfig,
    SloPolicy,
    StaticConfig,
    StepLoad,
    StepTime,
    StepTimes,
    succeed,
)
from policies.config import FloorsConfig
from tests.cpu.test_slo_parts import QUIET
from tests.fakes import Rig

pytestmark = pytest.mark.cpu

__all__ = ["patient"]  # the fixture


@dataclass(frozen=True)
class Engine:
    """A machine with a model, the pace of its users, and what they are promised."""

    calibration: Calibration
    pace: float  # of bursts, against those on the usual engine
    light: float  # requests per second that full precision serves
    promise: Slo


def _machine(base: StepTime, w8: StepTime, w4: StepTime, move: LayerMove) -> Calibration:
    return replace(CALIBRATION, times=StepTimes({"base": base, "w8": w8, "w4": w4}, move))


ENGINES = {
    "usual": Engine(CALIBRATION, 1.0, 1.2, Slo()),
    "gpu": Engine(
        _machine(
            StepTime(0.008, 2e-5, 1e-5, 2e-8), StepTime(0.0055, 1.6e-5, 7e-6, 2e-8),
            StepTime(0.0045, 3e-5, 1.2e-5, 2e-8), LayerMove(2e-4, 3e-4),
        ), 8.0, 2.4, Slo(2.0, 0.05),
    ),
    "laptop": Engine(
        _machine(
            StepTime(0.12, 0.006, 0.008, 6e-6), StepTime(0.07, 0.005, 0.006, 6e-6), StepTime(0.06, 0.008, 0.007, 6e-6),
            LayerMove(0.02, 0.05),
        ), 0.11, 0.13, Slo(8.0, 0.6),
    ),
}  # fmt: skip


def run(engine: Engine, load: Workload, seed: int, calibrated: bool = False) -> Simulated:
    promise = engine.promise
    known = config(kind="slo", ttft_s=promise.ttft_s, tpot_s=promise.tpot_s)
    if calibrated:
        known = known.model_copy(update={"step_times": Path("times.json")})
    return simulate(load, replace(SERVER, step_noise=0.05), known, engine.calibration, seed=seed)


def at_pace(engine: Engine, seed: int) -> Workload:
    """Three bursts with light traffic between them, by this engine's clock; the first comes at once."""
    rng, pace = random.Random(seed), engine.pace
    made = poisson(0.7 * pace, 0.0, 100 / pace, rng)
    for number in range(3):
        made += poisson(9.0 * pace, (5 + number * 30) / pace, 6 / pace, rng)
    return workload(sorted(made))


def test_it_is_what_a_user_gets() -> None:
    """Guards: a default that must be configured before it is any good."""
    assert parse_config({}) == MorphServeConfig()
    assert MorphServeConfig().policy == SloConfig(kind="slo") and MorphServeConfig().step_times is None


@pytest.mark.parametrize("name", ENGINES)
def test_bursts_cost_what_they_cost_with_a_calibration(name: str) -> None:
    """Guards: promises broken, or quality spent, while or because the step times were learned."""
    late, kl = [0.0, 0.0], [0.0, 0.0]
    for seed in range(3):
        load = at_pace(ENGINES[name], seed)
        for i, calibrated in enumerate((True, False)):
            result = run(ENGINES[name], load, seed, calibrated)
            late[i] += result.violation_rate(ENGINES[name].promise) / 3
            kl[i] += (result.expected_kl_per_token or 0) / 3
            assert result.status is not None
            assert result.status["predictions"] == ("calibrated" if calibrated else "learned")
    assert late[1] <= late[0] + 0.002 and kl[1] <= 1.1 * kl[0]


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("seed", range(4))
def test_steady_light_traffic_enters_nothing(name: str, seed: int) -> None:
    """Guards: quality given away because a prior says that the engine cannot serve what it serves."""
    engine = ENGINES[name]
    light = workload(poisson(engine.light, 0.0, 80.0 / engine.light, random.Random(seed)))
    result = run(engine, light, seed)
    assert result.transitions == 0 and result.violation_rate(engine.promise) == 0


@pytest.mark.parametrize("error", [0.7, 1.4])
def test_time_factors_that_are_wrong_cost_little(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a start-up measurement, of one layer on one thread, that is believed against the steps."""
    load = bursts(4, 15.0, 3)
    right = simulate(load, SERVER, config(kind="slo"), CALIBRATION)
    factor = "morphserve.tools.sim.morphing._factor"
    monkeypatch.setattr(factor, lambda time, base, n: error * time.seconds(n, 0, 0) / base.seconds(n, 0, 0))
    wrong = simulate(load, SERVER, config(kind="slo"), CALIBRATION)
    assert wrong.violation_rate(Slo()) <= right.violation_rate(Slo()) + 0.01
    assert (wrong.expected_kl_per_token or 0) <= 1.1 * (right.expected_kl_per_token or 0)


# ---- what it says of itself


def learner() -> SloPolicy:
    policy = LEARNED.build(LADDER)
    assert isinstance(policy, SloPolicy)
    return policy


def steps(policy: SloPolicy, count: int, start: int = 0, every_s: float = 1.0) -> None:
    """So many; after each it says that it is learning, or one thing else."""
    said = []
    for number in range(start, start + count):
        step = StepLoad(0.02, 2, 0, 300, 0)
        policy.decide(replace(QUIET, now_s=100.0 + every_s * number, last_step=step))
        said.append(policy.predictions)
    assert len(set(said) - {"learning"}) <= 1 and said == sorted(said, key=lambda word: word != "learning")


def test_it_says_what_it_predicts_from() -> None:
    """Guards: a status that says learned before anything was, or trusts what has been wrong."""
    policy = learner()
    assert policy.predictions == "learning"
    steps(policy, 40, every_s=0.02)
    assert policy.predictions == "learned"
    policy.correction._wait_square = 2.0
    steps(policy, 1, 40)
    assert policy.predictions == "distrusted"
    calibrated = SLO.build(LADDER)
    assert calibrated.predictions == "calibrated" and THRESHOLD.build(LADDER).predictions is None


def test_thresholds_decide_while_it_learns() -> None:
    """Guards: a burst in the first second that nobody answers, or that a mere prior does."""
    policy, threshold = learner(), THRESHOLD.build(LADDER)
    full = replace(QUIET, num_kv_blocks=20, used_kv_blocks=18, num_running=6)
    asked, by_threshold = policy.decide(full), threshold.decide(full)
    assert asked.level == by_threshold.level > 0 and asked.reason == by_threshold.reason


def test_no_wait_is_judged_that_the_prior_predicted() -> None:
    """Guards: trust lost before the first prediction was made, on every engine that is not like the prior."""
    policy = learner()
    before = policy.correction.sigma
    for number in range(20):
        now_s = 100.0 + 5 * number
        cohort = Cohort(1, 64, now_s, now_s)
        policy.decide(replace(QUIET, now_s=now_s, num_running=1, used_kv_blocks=2, num_waiting=1, waiting=(cohort,)))
        policy.decide(replace(QUIET, now_s=102.0 + 5 * number))
    assert policy.predictions == "learning" and policy.correction.sigma == before


def test_a_change_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: an operator who cannot see when predictions were first trusted, or a line at every step."""
    caplog.set_level(logging.INFO)
    rig = Rig()
    rig = Rig(policy=LEARNED.build(rig.ladder))
    assert rig.controller.status()["predictions"] == "learning"
    rig.pool.allocate(1, 1)
    for _ in range(60):
        rig.step()
        rig.monitor.on_step(rig.now_s, 1, 1, 0, 100, 0)
    said = [record.getMessage() for record in caplog.records if "predictions" in record.getMessage()]
    assert [line.split(":")[1].split()[-1] for line in said] == ["learning", "learned"], said
    rig.controller.replace_policy(LEARNED.build(rig.ladder), "edited", LEARNED)
    rig.step()
    assert rig.controller.status()["predictions"] == "learned" and rig.controller.level == 0


def test_a_promise_that_no_level_keeps_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: an operator who is not told that his YAML asks for the impossible, or at every step; a warning before
    anything was measured."""
    rig = Rig()
    impossible = replace(LEARNED, section=SloConfig(kind="slo", tpot_s=1e-4))
    rig = Rig(policy=impossible.build(rig.ladder))
    rig.pool.allocate(1, 1)

    def warned(count: int) -> list[str]:
        for _ in range(count):
            rig.step()
            rig.monitor.on_step(rig.now_s, 1, 1, 0, 100, 0)
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    assert not warned(20)
    (line,) = warned(100)
    assert "tpot_s of 0.0001 s" in line and "a lone request takes 0.05" in line and "Raise policy.ttft_s" in line
    assert rig.controller.status()["predictions"] == "unkeepable"
    rig.controller.replace_policy(impossible.build(rig.ladder), "edited", impossible)
    assert len(warned(10)) == 2, "another policy's is another promise"
    rig.controller.replace_policy(LEARNED.build(rig.ladder), "edited", LEARNED)
    assert len(warned(10)) == 2 and rig.controller.status()["predictions"] == "learned"


# ---- another policy, and a log of both


def test_a_new_section_keeps_what_was_learned() -> None:
    """Guards: a reload in a burst after which thresholds decide for as long as it takes to learn again."""
    old, new = learner(), learner()
    steps(old, 40)
    succeed(new, old)
    assert new.predictions == "learned"
    for stranger in (SLO.build(LADDER), THRESHOLD.build(LADDER)):
        fresh = learner()
        succeed(fresh, stranger)
        succeed(stranger, old)
        assert fresh.predictions == "learning" and stranger.predictions in ("calibrated", None)


@pytest.mark.usefixtures("patient")
def test_a_log_with_a_reload_replays(tmp_path: Path) -> None:
    """Guards: a replay whose policy knows less after a reload than the one that was asked."""
    path, signals = tmp_path / "log", load(4, 600)
    log = DecisionLog(path, make_header(LEARNED, LADDER))
    first, second = learner(), LEARNED.build(LADDER)
    ask(log, first, signals[:300])
    log.policy_changed("edited", LEARNED)
    succeed(second, first)
    ask(log, second, signals[300:])
    log.close()
    found = replay(path)
    assert found.agrees and found.compared == 600
    text = path.read_text()
    assert '"times":null' in text.splitlines()[0]


@pytest.mark.usefixtures("patient")
def test_what_a_policy_goes_on_from() -> None:
    """Guards: a replay that is sure of a policy whose predecessor it does not know: of its step times, or of the
    seconds that requests have spent; one that is never sure again."""
    floors = FloorsConfig(keys={"0123456789abcdef": 0})
    static, open_door = (PolicySetup(StaticConfig(kind="static", floors=f)) for f in (FloorsConfig(), floors))
    assert LEARNED.inherits(SLO) and SLO.inherits(LEARNED) and open_door.inherits(open_door)
    for one, other in ((SLO, static), (static, SLO), (static, static), (static, open_door), (open_door, SLO)):
        assert not one.inherits(other)


def test_what_was_learned_in_a_gap_is_not_made_up(tmp_path: Path) -> None:
    """Guards: differences reported of a policy whose knowledge stands in rows that were dropped."""
    path, signals = tmp_path / "log", load(4, 300)
    write(path, LEARNED, signals)
    lines = path.read_text().splitlines()
    header = lines[0].replace('"event":"start"', '"event":"policy"')
    gap = [*lines[:100], '{"event":"dropped","seq":199}', header, *lines[200:]]
    path.write_text("\n".join(gap) + "\n")
    found = replay(path)
    assert found.compared == 99 and found.skipped == 101 and not found.differing


def test_limits_come_from_the_engine() -> None:
    """Guards: a learner that is asked without knowing a block's size."""
    assert LEARNED.limits == LIMITS and LEARNED.times is None is not SLO.times
