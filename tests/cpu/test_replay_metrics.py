"""Violations, aggregates and what the server's time series tells."""

from __future__ import annotations

import json
from typing import Any

import pytest

from morphserve.tools.bench.load.scrape import snapshot
from morphserve.tools.workload import Slo, timeline
from morphserve.tools.workload.metrics import bench_result, dispatch_lag, violations
from morphserve.tools.workload.outcome import CUTOFF, Outcome, Replayed, Snapshot


def answered(ttft_s: float, tpot_s: float, tokens: int = 11, sent_s: float | None = 0.0) -> Outcome:
    outcome = Outcome(0, 0.0, 5, tokens, sent_s=sent_s, status="ok", ttft_s=ttft_s, output_tokens=tokens)
    outcome.itls_s = [tpot_s] * (tokens - 1)
    outcome.latency_s = ttft_s + tpot_s * (tokens - 1)
    outcome.ended_s = (sent_s or 0.0) + outcome.latency_s
    return outcome


def test_violation_rate_is_over_requests_sent() -> None:
    """Guards the headline: limits count alone and jointly, failures count, the unsent do not."""
    failed = Outcome(0, 0.0, 5, 11, sent_s=1.0, status=CUTOFF, ttft_s=0.1)
    unsent = Outcome(0, 9.0, 5, 11)
    got = violations(
        [answered(0.1, 0.01), answered(2.5, 0.01), answered(0.1, 0.2), answered(2.5, 0.2), failed, unsent],
        Slo(ttft_s=2.0, tpot_s=0.15),
    )
    assert (got["sent"], got["good"]) == (5, 1)
    assert got["violation_rate"] == pytest.approx(0.8)
    assert got["ttft_violation_rate"] == pytest.approx(0.6)
    assert got["tpot_violation_rate"] == pytest.approx(0.6)
    assert violations([unsent], Slo())["violation_rate"] is None


def test_limits_themselves_are_met_and_one_token_has_no_tpot() -> None:
    """Guards the edges vLLM defines: <= is good, a one-token answer has TPOT 0."""
    slo = Slo(ttft_s=2.0, tpot_s=0.125)
    assert slo.good(answered(2.0, 0.125, tokens=2))
    assert slo.good(answered(1.0, 0.0, tokens=1))
    assert not slo.good(answered(2.0, 0.126, tokens=2))


def test_result_of_a_run_without_answers_is_still_json() -> None:
    """Guards against NaN, a division by zero or an empty percentile when everything failed."""
    nothing = Replayed([Outcome(0, 0.0, 5, 3, sent_s=0.0)], started=10.0, duration_s=2.0)
    result = bench_result(nothing, Slo())
    json.dumps(result, allow_nan=False)
    assert (result["completed"], result["failed"], result["p99_ttft_ms"]) == (0, 1, 0.0)
    assert dispatch_lag([Outcome(0, 0.0, 5, 3)]) == {"mean_ms": None, "p99_ms": None, "max_ms": None}


PAGE = """# HELP vllm:num_requests_waiting Number of requests waiting
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="a b}\\"c"} 3.0
vllm:num_requests_waiting{engine="1",model_name="a b}\\"c"} 4.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
# HELP vllm:num_preemptions_total Cumulative number of preemptions
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0"} 1.2e+01
# TYPE vllm:num_preemptions_created gauge
vllm:num_preemptions_created{engine="0"} 1.7e+09
vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="49"} 1.0
process_cpu_seconds_total 5.0
"""
MORPH = """morphserve:level 2.0
morphserve:kv_blocks{state="published"} 153
morphserve:kv_blocks{state="backed"} 160
morphserve:kv_blocks{state="used"} 77
morphserve:layers{format="base"} 20
morphserve:layers{format="w8"} 10
morphserve:transitions_total{direction="degrade",outcome="committed"} 2
morphserve:transitions_total{direction="restore",outcome="failed"} 1
morphserve:tokens_total{level="0"} 100
morphserve:tokens_total{level="2"} 40
morphserve:transition_seconds_total 0.5
morphserve:pause_ms_max NaN
morphserve:errors_total{where="policy"} 0
"""


def test_stock_page_gives_blocks_and_no_level() -> None:
    """Guards runs without the plugin: absent metrics are None, blocks come from vLLM's own label."""
    s = snapshot(PAGE, 1.0)
    assert (s.waiting, s.running, s.preemptions, s.kv_usage) == (7, None, 12, 0.25)
    assert (s.blocks_published, s.blocks_used) == (49, 12)
    assert (s.level, s.is_morphserve, s.tokens_by_level) == (None, False, {})
    assert snapshot("<html>bad gateway\nvllm:x\nvllm:y {} z", 1.0) == Snapshot(1.0)


@pytest.mark.parametrize(
    "damaged",
    [
        '{engine="1"',
        '{engine="1"}',
        '{engine="1", ="0"} 5',
        '{engine="1",engine="1"} 5',
        "{engine=1} 5",
        '{engine="1"} 5_0',
        '{engine="1"} +Inf',
        '{engine="1"} NaN',
        f'{{engine="1"}} 1{"0" * 400}',
        "5",
    ],
)
def test_a_damaged_line_costs_no_other(damaged: str) -> None:
    """Guards a run of minutes, ended by one line, or left without figures by it."""
    name = "vllm:num_requests_waiting"
    for page in (f"{name}{damaged}\n{PAGE}", f"{PAGE}{name}{damaged}"):
        assert snapshot(page, 1.0) == snapshot(PAGE, 1.0)


def test_morphserve_page_overrides_the_stale_label() -> None:
    """Guards the picture after a resize, when vLLM's own block label is stale."""
    s = snapshot(PAGE + MORPH, 1.0)
    assert (s.level, s.blocks_published, s.blocks_backed, s.blocks_used) == (2, 153, 160, 77)
    assert s.layers == {"base": 20, "w8": 10}
    assert s.tokens_by_level == {"0": 100, "2": 40}
    assert s.transitions == {"degrade/committed": 2, "restore/failed": 1}
    assert timeline.committed(s.transitions) == 2
    assert s.pause_max_ms is None  # never set


def series(*rows: tuple[int | None, int, int]) -> list[Snapshot]:
    """One snapshot a second of (level, waiting, blocks used), 49 blocks at level 0."""
    return [
        Snapshot(
            float(i), level=level, waiting=waiting, blocks_used=used, blocks_published=49 + 40 * (level or 0)
        )
        for i, (level, waiting, used) in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0, 0, 5), (1, 3, 60), (1, 0, 60), (1, 0, 20), (0, 0, 20), (0, 0, 5)], 2.0),  # used > 48 until 2
        ([(0, 0, 5), (1, 3, 40), (1, 2, 40), (0, 0, 40), (0, 0, 5)], 1.0),  # waiting until 2
        ([(0, 9, 5), (1, 0, 5), (0, 0, 5), (1, 0, 49), (1, 0, 5), (0, 0, 5)], 2.0),  # the slower one
        ([(1, 0, 49), (1, 0, 5), (1, 0, 5), (1, 0, 5), (0, 0, 5), (1, 0, 49), (0, 0, 5)], 4.0),  # not the last
        ([(1, 0, 5), (1, 0, 40), (1, 0, 40), (1, 0, 9), (0, 0, 5)], 3.0),  # on a forecast: since the peak
        ([(0, 0, 5), (1, 0, 5), (1, 0, 5), (0, 0, 5), (0, 8, 5)], 2.0),  # the same, flat: since it left 0
        ([(0, 4, 5), (0, 0, 5)], None),  # never left
        ([(0, 4, 5), (1, 0, 5)], None),  # never returned
        ([(None, 4, 5), (None, 0, 5)], None),  # no plugin
        ([], None),
    ],
)
def test_level_zero_after_counts_from_the_end_of_pressure(
    rows: list[tuple[int | None, int, int]], expected: float | None
) -> None:
    """Guards the recovery time: measured from the wrong moment it flatters or punishes the policy."""
    assert timeline.level_zero_after_s(series(*rows), 49) == expected
    assert timeline.level_zero_after_s(series(*rows), None) == expected


STATUS: dict[str, Any] = {
    "ladder": [
        {"level": 0, "num_kv_blocks": 49, "expected_kl": None},
        {"level": 1, "num_kv_blocks": 97, "expected_kl": 0.02},
        {"level": 2, "num_kv_blocks": 153, "expected_kl": None},
    ]
}


def test_expected_kl_weighs_levels_by_tokens_and_admits_ignorance() -> None:
    """Guards the price: a level that nobody measured must not count as free."""
    assert timeline.expected_kl({"0": 300, "1": 100}, STATUS) == pytest.approx(0.005)
    assert timeline.expected_kl({"0": 300}, STATUS) == 0.0
    assert timeline.expected_kl({"0": 300, "2": 1}, STATUS) is None
    assert timeline.expected_kl({"0": 300, "7": 1}, STATUS) is None
    assert timeline.expected_kl({}, STATUS) is None
    assert timeline.expected_kl({"0": 300}, None) is None
    assert timeline.level0_blocks(STATUS) == 49
    assert timeline.level0_blocks(None) is None


def test_counters_are_differences_over_the_run() -> None:
    """Guards --url runs: a server's earlier life is not this run's."""
    assert timeline.gained({"0": 10, "1": 5}, {"0": 30, "1": 5, "2": 1}) == {"0": 20, "2": 1}
