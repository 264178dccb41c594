"""Our aggregates against those of the installed `vllm bench serve`."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest
import vllm.benchmarks.serve as bench
from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

from morphserve.tools.bench.report.results import RunResult
from morphserve.tools.workload import Slo
from morphserve.tools.workload.metrics import PERCENTILES, bench_result
from morphserve.tools.workload.outcome import Outcome, Replayed


def outcomes(seed: int, num: int = 60) -> list[Outcome]:
    """Answers of 1 to 40 tokens, some failures."""
    rng = random.Random(seed)
    made = []
    for i in range(num):
        tokens = rng.choice((1, 2, rng.randint(3, 40)))
        o = Outcome(i, i * 0.3, rng.randint(1, 99), tokens, sent_s=i * 0.3 + rng.random() / 50)
        o.ttft_s = rng.lognormvariate(-0.5, 1.5)
        # a chunk may carry more than one token: fewer gaps than tokens
        o.itls_s = [rng.lognormvariate(-2.3, 0.8) for _ in range(max(0, tokens - 1 - (i % 7 == 0)))]
        o.latency_s = o.ttft_s + sum(o.itls_s)
        if i % 11 != 5:
            o.status, o.output_tokens = "ok", tokens
        made.append(o)
    return made


def as_vllm(o: Outcome, started: float) -> RequestFuncOutput:
    return RequestFuncOutput(
        generated_text=o.text,
        success=o.ok,
        latency=o.latency_s,
        output_tokens=o.output_tokens,
        ttft=o.ttft_s,
        itl=o.itls_s,
        prompt_len=o.prompt_tokens,
        start_time=started + (o.sent_s or 0.0),
    )


@pytest.mark.parametrize("seed", range(5))
def test_aggregates_equal_vllms(seed: int) -> None:
    """Guards the definitions: a figure of ours must mean what the same name means in vLLM."""
    made = outcomes(seed)
    slo = Slo(ttft_s=1.0, tpot_s=0.12)
    ours = bench_result(Replayed(made, started=1000.0, duration_s=25.0), slo)
    theirs, lens = bench.calculate_metrics(
        input_requests=[SampleRequest(prompt="", prompt_len=1, expected_output_len=1) for _ in made],
        outputs=[as_vllm(o, 1000.0) for o in made],
        dur_s=25.0,
        tokenizer=None,
        selected_percentiles=list(PERCENTILES),
        goodput_config_dict={"ttft": 1000.0, "tpot": 120.0},
    )
    assert ours["output_lens"] == lens
    same = {
        "completed": "completed", "failed": "failed", "total_input_tokens": "total_input",
        "total_output_tokens": "total_output", "request_throughput": "request_throughput",
        "request_goodput": "request_goodput", "output_throughput": "output_throughput",
        "total_token_throughput": "total_token_throughput",
        "max_output_tokens_per_s": "max_output_tokens_per_s",
        "max_concurrent_requests": "max_concurrent_requests",
    }  # fmt: skip
    for ours_key, theirs_key in same.items():
        assert ours[ours_key] == pytest.approx(getattr(theirs, theirs_key)), ours_key
    for metric in ("ttft", "tpot", "itl", "e2el"):
        for statistic in ("mean", "median", "std"):
            key = f"{statistic}_{metric}_ms"
            assert ours[key] == pytest.approx(getattr(theirs, key)), key
        for percentile, value in getattr(theirs, f"percentiles_{metric}_ms"):
            assert ours[f"p{percentile}_{metric}_ms"] == pytest.approx(value), (metric, percentile)
    assert math.isfinite(ours["p99_tpot_ms"]) and 0 < ours["request_goodput"] < ours["request_throughput"]


def test_result_file_has_every_key_of_a_detailed_vllm_result(tmp_path: Path) -> None:
    """Guards tools that read vLLM's result files: a key that vLLM adds must not be missing from ours."""
    source = Path(bench.__file__).read_text(encoding="utf-8")
    literal = re.search(r"result = \{\n(.*?)\n\s+\}\n", source, re.DOTALL)
    assert literal is not None
    keys = set(re.findall(r'^\s+"(\w+)":', literal[1], re.MULTILINE))
    keys |= set(re.findall(r'^    result_json\["(\w+)"\]', source, re.MULTILINE))
    assert {"duration", "start_times", "generated_texts", "date", "max_concurrency"} <= keys
    run = RunResult("stock", 1, tmp_path, Slo(), Replayed(outcomes(0), 0.0, 25.0), [], None)
    assert keys <= set(run.document())
