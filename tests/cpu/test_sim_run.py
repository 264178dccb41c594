"""Whole runs: what the controller promises holds in virtual time, and the figures are those of a measured run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cpu.sim_world import CALIBRATION, SERVER, TIMES, config, workload

from morphserve.config import MorphServeConfig
from morphserve.control.decisions.decision_log import Header, Mark, Row
from morphserve.control.decisions.replay_log import read_log
from morphserve.control.ladder import ProfileLadder
from morphserve.errors import ConfigError
from morphserve.tools.bench.report.results import RunResult
from morphserve.tools.sim import Simulated, simulate
from morphserve.tools.sim.engine import SimEngine
from morphserve.tools.workload import Slo, WorkloadError, WorkloadSpec, load_workload
from policies import Decision, Signals, ThresholdPolicy

SHIPPED = Path(__file__).parents[2] / "scripts" / "workloads"
SLO = Slo()
HARD = load_workload(WorkloadSpec(SHIPPED / "hybB.jsonl"))


def run(config: MorphServeConfig | None, **changes: object) -> Simulated:
    return simulate(HARD, replace(SERVER, **changes), config, CALIBRATION)


def test_one_request_takes_what_its_steps_take() -> None:
    """Guards: step times, the offset or the clock are added up wrongly; every figure would be off."""
    done = simulate(workload([(1.0, 10, 3)]), SERVER, None, CALIBRATION)
    base = TIMES.formats["base"]
    steps = [base.seconds(1, 9, 10), base.seconds(1, 0, 11), base.seconds(1, 0, 12)]
    (outcome,) = done.outcomes
    assert outcome.ok and outcome.output_tokens == 3 and outcome.sent_s == 1.0
    assert outcome.ttft_s == pytest.approx(TIMES.offset_s + steps[0])
    assert outcome.itls_s == pytest.approx(steps[1:])
    assert outcome.ended_s == pytest.approx(1.0 + outcome.latency_s)
    assert done.num_steps == 3


def test_same_inputs_same_run() -> None:
    """Guards: a tuner that compares noise; and a seed that changes nothing."""
    assert run(config()).series == run(config()).series
    noisy = [
        simulate(HARD, replace(SERVER, step_noise=0.1), config(), CALIBRATION, seed=seed).outcomes for seed in (1, 1, 2)
    ]
    assert noisy[0] == noisy[1] != noisy[2]


def test_decisions_are_logged(tmp_path: Path) -> None:
    """Guards: a simulated run without its log, one that the log changes, or a sample that drops rows."""
    wanted = {"decision_log": tmp_path / "log.jsonl.gz", "decision_log_detail": "all"}
    assert run(config().model_copy(update=wanted)).series == run(config()).series
    first, *rows, last = (line for _, line in read_log(tmp_path / "log.jsonl.gz"))
    assert isinstance(first, Header) and first.detail == "changes" and first.setup.times is None
    assert isinstance(last, Mark) and last.event == "end" and last.seq > 10 * len(rows)
    assert {row.decision.level > 0 for row in rows if isinstance(row, Row) and row.changed} == {True, False}
    assert all(isinstance(row, Row) for row in rows)


def test_speed_stretches_every_time() -> None:
    """Guards: an interval of +-10 % around a run that is no interval."""
    slow = simulate(workload([(0.0, 10, 50)]), SERVER, None, CALIBRATION, speed=2.0).outcomes[0]
    usual = simulate(workload([(0.0, 10, 50)]), SERVER, None, CALIBRATION).outcomes[0]
    assert slow.latency_s - TIMES.offset_s == pytest.approx(2 * (usual.latency_s - TIMES.offset_s))


def test_figures_are_those_of_a_measured_run(tmp_path: Path) -> None:
    """Guards: a tuner's figures that say something else than the report's."""
    for settings in (None, config()):
        done = run(settings, max_num_batched_tokens=64)  # prompts come in chunks
        figures = RunResult("x", 1, tmp_path, SLO, done.replayed, done.series, done.status).figures()
        assert figures["violation_rate"] == pytest.approx(done.violation_rate(SLO))
        assert figures["preemptions"] == done.preemptions
        assert figures["sent"] == len(HARD.requests)
        if settings is not None:
            assert figures["tokens_by_level"] == done.tokens_by_level
            assert sum(done.tokens_by_level.values()) == HARD.output_tokens
            assert figures["expected_kl_per_token"] == done.expected_kl_per_token
            assert figures["transitions"] == done.transitions > 0
            assert figures["level_zero_after_s"] > 0 and figures["pause_max_ms"] > 0
            assert figures["errors"] == {}


def test_morphing_helps_where_memory_binds_and_comes_back() -> None:
    """Guards: a simulated controller that never moves, or moves without effect."""
    stock, morphing = run(None), run(config())
    assert stock.violation_rate(SLO) > 0.3 and stock.preemptions > 50
    assert morphing.violation_rate(SLO) < 0.05 and morphing.preemptions < 10
    assert max(s.blocks_published or 0 for s in morphing.series) > 100
    last = morphing.series[-1]
    assert (last.level, last.blocks_published, last.layers) == (0, SERVER.num_blocks, {"base": 30})


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_promises_hold_at_every_step(
    prefix_caching: bool, async_scheduling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: more blocks in use than published, more published than the level frees the bytes for, a lost request;
    under a policy that turns around all the time."""
    swings = iter([0, 3, 1, 4, 0, 2] * 100_000)

    def swing(_: ThresholdPolicy, signals: Signals) -> Decision:
        return Decision(next(swings) if int(signals.now_s) % 3 else 0, "swing")

    monkeypatch.setattr(ThresholdPolicy, "decide", swing)
    step = SimEngine._step
    seen = set()

    def checked(engine: SimEngine) -> None:
        step(engine)
        morphing, pool = engine._morphing, engine._scheduler.pool
        assert morphing is not None
        controller, ladder = morphing.controller, morphing.ladder
        assert pool.used <= pool.num_kv_blocks - 1
        assert pool.num_kv_blocks <= ladder[controller.effective_level].num_kv_blocks
        paid = morphing.executor._weight_bytes + pool.num_kv_blocks * CALIBRATION.rank.kv_block_bytes
        assert paid <= ladder[0].weight_bytes + ladder[0].num_kv_blocks * CALIBRATION.rank.kv_block_bytes
        assert not controller.failed
        seen.add(controller.phase.name)

    monkeypatch.setattr(SimEngine, "_step", checked)
    settings = config(kind="threshold").model_copy(update={"kv": config().kv.model_copy(update={"max_preemptions": 3})})
    done = run(settings, prefix_caching=prefix_caching, async_scheduling=async_scheduling)
    assert "DRAINING" in seen and done.transitions > 0
    assert all(outcome.ok and outcome.output_tokens == outcome.asked_tokens for outcome in done.outcomes)
    assert done.series[-1].blocks_used == 0


def test_a_static_run_is_at_its_level_before_the_first_request() -> None:
    """Guards: a baseline that pays its way down in the middle of the workload."""
    done = run(config(kind="static", level="w4"), restore_wait_s=0.0)
    assert done.series[0].layers == {"w4": 30} and done.series[0].t_s == 0.0
    assert list(done.tokens_by_level) == [str(done.series[0].level)] and done.transitions == 0
    alone = simulate(workload([(0.0, 10, 1)]), SERVER, config(kind="static", level="w4"), CALIBRATION).outcomes[0]
    assert alone.ttft_s == pytest.approx(TIMES.offset_s + TIMES.formats["w4"].seconds(1, 9, 10))


def test_a_transition_costs_time() -> None:
    """Guards: switches and copies for nothing, which a policy would then do all the time."""
    late = workload([(5.0, 20, 40)])
    slow = replace(CALIBRATION, times=replace(TIMES, move=replace(TIMES.move, degrade_s=0.02)))
    policy = config(kind="threshold", degrade_above=0.01, target_usage=0.01, restore_below=0.01)
    usual = simulate(late, SERVER, policy, CALIBRATION).outcomes[0]
    dear = simulate(late, SERVER, policy, slow).outcomes[0]
    assert dear.latency_s > usual.latency_s + 0.1
    assert max(dear.itls_s) > 0.02


def test_prefix_caching_saves_prompt_work() -> None:
    """Guards: hash ids of the trace that are not looked at."""
    shared = workload([(float(i), 300, 4) for i in range(5)])
    ids = replace(shared, requests=tuple(replace(r, hash_ids=(7,)) for r in shared.requests))
    caching = replace(SERVER, prefix_caching=True)
    cold = [o.ttft_s for o in simulate(ids, SERVER, None, CALIBRATION).outcomes]
    warm = [o.ttft_s for o in simulate(ids, caching, None, CALIBRATION).outcomes]
    other = [o.ttft_s for o in simulate(shared, caching, None, CALIBRATION).outcomes]
    assert warm[0] == cold[0] and all(w < c / 2 for w, c in zip(warm[1:], cold[1:], strict=True))
    assert other == cold


def test_the_door_refuses_beyond_the_queue_limit() -> None:
    """Guards: a queue limit that does not limit, or counts requests that have their first token."""
    crowd = workload([(0.0, 400, 4), (0.001, 400, 4), (0.002, 400, 4), (3.0, 400, 4)])
    done = simulate(crowd, replace(SERVER, max_num_queued_tokens=500), None, CALIBRATION)
    assert [o.status for o in done.outcomes] == ["ok", "ok", "http_503", "ok"]
    assert done.violation_rate(SLO) == 0.25 and done.outcomes[2].ended_s is not None
    assert simulate(crowd, replace(SERVER, max_num_queued_tokens=0), None, CALIBRATION).violation_rate(SLO) == 1.0


def test_the_client_gives_up() -> None:
    """Guards: requests that nobody waits for any more keep the engine busy, or count as served."""
    crowd = workload([(0.0, 400, 100)] * 20)
    done = simulate(crowd, replace(SERVER, request_timeout_s=4.0), None, CALIBRATION)
    gone = [o for o in done.outcomes if o.status == "timeout"]
    assert 5 < len(gone) < 20 and all(o.ended_s == 4.0 and "within 4 s" in o.error for o in gone)
    assert done.series[-1].blocks_used == 0 and done.series[-1].t_s < 5.0
    cut = simulate(crowd, replace(SERVER, cutoff_s=3.0), None, CALIBRATION)
    assert {o.status for o in cut.outcomes} == {"ok", "cutoff"} and cut.replayed.duration_s == 3.0


def test_what_no_server_would_take_is_refused() -> None:
    """Guards: a run of nonsense that ends in figures."""
    two = workload([(0.0, 10, 10)])
    with pytest.raises(WorkloadError, match="exceed max_model_len 512"):
        simulate(workload([(0.0, 500, 13)]), SERVER, None, CALIBRATION)
    with pytest.raises(ConfigError, match="cannot hold one request"):
        simulate(two, replace(SERVER, num_blocks=16), None, CALIBRATION)
    with pytest.raises(ConfigError, match="speed is 0"):
        simulate(two, SERVER, None, CALIBRATION, speed=0.0)
    with pytest.raises(ConfigError, match="blocks of 7 tokens"):
        simulate(two, replace(SERVER, block_size=7, max_model_len=200), config(), replace(CALIBRATION, block_size=27))
    only_base = replace(TIMES, formats={"base": TIMES.formats["base"]})
    with pytest.raises(ConfigError, match="'w8' are not known"):
        simulate(two, SERVER, config(), replace(CALIBRATION, times=only_base))
    with pytest.raises(ConfigError, match="kv.base_num_blocks is 60"):
        simulate(two, SERVER, MorphServeConfig.model_validate({"kv": {"base_num_blocks": 60}}), CALIBRATION)
    with pytest.raises(ConfigError, match="profile .* was not read"):
        simulate(two, SERVER, MorphServeConfig(profile=Path("p")), CALIBRATION)
    with pytest.raises(ConfigError, match="policy: level 99"):
        simulate(two, SERVER, config(kind="static", level=99), CALIBRATION)


def test_a_profile_gives_the_ladder() -> None:
    """Guards: a profile's levels are ignored, and another ladder is simulated than the one that serves."""
    levels = ({}, {3: "w8"}, {3: "w8", 5: "w4"})
    profile = ProfileLadder(tuple(range(30)), levels, (0.0, 0.01, 0.2))
    settings = MorphServeConfig.model_validate({"profile": "p", "policy": {"kind": "static", "level": 2}})
    done = simulate(HARD, replace(SERVER, restore_wait_s=0.0), settings, CALIBRATION, profile=profile)
    assert done.series[-1].layers == {"base": 28, "w8": 1, "w4": 1} and done.expected_kl_per_token == 0.2


def test_loads_without_torch() -> None:
    """Guards: a tuner that waits for torch at every start; the import rules do not see package `__init__` files."""
    code = "import morphserve.tools.sim, sys; sys.exit(any(m in sys.modules for m in ('torch', 'vllm')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
