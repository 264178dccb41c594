"""Load and limits that fit the machine: measured on a stock server, the same burst for slow machines and fast ones."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestServer
from cpu.replay_fakes import FakeServer
from cpu.test_replay_compare import FAKE, comparison

from morphserve.errors import ConfigError
from morphserve.shipped import DEFAULT_CONFIG
from morphserve.tools.bench import main
from morphserve.tools.bench.comparison import Comparison, derived_config
from morphserve.tools.bench.fit import TPOT_OF_LONE, TTFT_OF_LONE, Given, fit
from morphserve.tools.bench.fitted import run_fitted
from morphserve.tools.bench.load import probe
from morphserve.tools.bench.load.client import ClientOptions
from morphserve.tools.bench.load.probe import StockSpeed
from morphserve.tools.bench.load.scrape import num_kv_blocks
from morphserve.tools.bench.load.server import ServerOptions
from morphserve.tools.bench.report.console import ConsoleProgress
from morphserve.tools.sim import SimServer
from morphserve.tools.workload import ReplayError, Slo, load_workload
from morphserve.tools.workload.outcome import Outcome
from morphserve.tools.workload.workload import WorkloadSpec
from policies import StepTime, load_step_times

ROOT = Path(__file__).parents[2]
TIMES = ROOT / "docs" / "results" / "step_times.json"
CONV = ROOT / "scripts" / "workloads" / "convD.jsonl"
SERVER = SimServer(num_blocks=49, block_size=32, max_model_len=512)
REFERENCE = StockSpeed.calibrated(load_step_times(TIMES).formats["base"], 0.0)


def test_the_multiples_are_those_of_the_reference() -> None:
    """Guards: limits that drift away from what 2 s and 150 ms are on the machine that they were chosen on."""
    assert TTFT_OF_LONE * REFERENCE.lone_ttft_s == pytest.approx(2.0, rel=0.02)
    assert TPOT_OF_LONE * REFERENCE.lone_tpot_s == pytest.approx(0.150, rel=0.02)


@pytest.mark.parametrize("workload", ["convD", "hybB"])
@pytest.mark.parametrize("speed", [0.2, 0.5, 1.0, 2.0, 4.0])
def test_every_machine_sees_a_burst_that_hurts_stock_and_that_morphing_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], speed: float, workload: str
) -> None:
    """Guards: a demo that shows nothing because the machine is too fast, or only failures because it is too slow."""
    code = main(
        ["--workload", str(CONV.with_stem(workload)), "--simulate", "--fit", "--step-times", str(TIMES), "--quiet",
         "--sim-speed", str(speed), "--compare", "stock,morphserve", "--out", str(tmp_path / "out"),
         "--config", str(ROOT / "policies" / "yaml" / "demo.yaml")],
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    stock, morph = document["runs"]
    assert stock["violation_rate"] >= 0.2
    assert morph["violation_rate"] <= 0.05 * stock["violation_rate"]
    assert stock["ttft_p95_s"] >= 10 * morph["ttft_p95_s"]
    assert document["slo"]["tpot_s"] == pytest.approx(0.150 * speed, rel=0.05)
    assert document["fit"]["sentence"] in err
    assert document["fit"]["sentence"] in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")


def scaled(speed: float) -> StockSpeed:
    return StockSpeed.calibrated(REFERENCE.step, 0.0, speed)


def test_a_slow_machine_gets_fewer_requests_and_a_fast_one_gets_them_faster() -> None:
    """Guards: a run of many minutes on a slow machine, a fast one that is asked for less than it can do."""
    slow, fast = (fit(WorkloadSpec(CONV), Given(), SERVER, scaled(speed)) for speed in (4.0, 0.2))
    assert slow.thin > 1.5 and slow.rate_scale == 1.0 and slow.num_requests < slow.num_all == 81
    assert fast.thin == 1.0 and fast.rate_scale > 3.0 and fast.num_requests == 81
    assert f"{slow.num_requests} of 81 requests" in slow.sentence("a CPU")
    assert f"--thin {slow.thin:g} --rate-scale 1 --slo-ttft-s {slow.slo.ttft_s:g}" in slow.sentence("a CPU")
    assert "all 81 requests" in fast.sentence("") and "times as fast" in fast.sentence("")
    again = fit(WorkloadSpec(CONV), Given(), SERVER, scaled(4.0))
    assert again == slow


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (Given(thin=2.0), {"thin": 2.0, "rate_scale": 1.0}),
        (Given(rate_scale=1.5), {"thin": 1.0, "rate_scale": 1.5}),
        (Given(slo_ttft_s=3.0), {"slo_ttft_s": 3.0, "slo_tpot_ms": 300.0}),
        (Given(slo_tpot_ms=99.0), {"slo_ttft_s": 4.0, "slo_tpot_ms": 99.0}),
        (Given(cutoff_s=33.0), {"cutoff_s": 33.0}),
    ],
)
def test_what_is_given_stays(given: Given, found: dict[str, float]) -> None:
    """Guards: an explicit value overruled by what was measured."""
    spec = WorkloadSpec(CONV, thin=given.thin or 1.0, rate_scale=given.rate_scale or 1.0)
    document = fit(spec, given, SERVER, scaled(2.0)).document()
    assert {key: document[key] for key in found} == found


def test_a_run_ends_when_a_server_that_keeps_up_has_ended() -> None:
    """Guards: minutes of waiting for what is late by any limit, or a slow machine's answers cut off at 0 % late."""
    fast, slow = (fit(WorkloadSpec(CONV), Given(), SERVER, scaled(speed)) for speed in (1.0, 20.0))
    longest = max(request.output_tokens for request in load_workload(WorkloadSpec(CONV)).requests)
    assert fast.cutoff_s == 60.0 and f"--cutoff {slow.cutoff_s:g}" in slow.sentence("a CPU")
    assert slow.cutoff_s == pytest.approx(slow.slo.ttft_s + 2 * longest * slow.speed.lone_tpot_s, rel=0.05)


def test_a_load_that_no_thinning_reaches_is_the_heaviest_found() -> None:
    """Guards: a window that hurts nobody, which would leave no fit at all, or one of which nobody is told."""
    quiet = "synthetic:1,rate=0.05,duration=200,input=20,output=4"
    found = fit(WorkloadSpec(Path(quiet)), Given(), SERVER, scaled(0.2))
    assert found.late == 0.0 and found.num_requests >= 1 and found.slo.ttft_s == 0.4
    said = found.sentence("a CPU")
    assert said.startswith("WARNING: this machine is too fast for this window: ") and "0% of stock's requests" in said
    hurt = fit(WorkloadSpec(CONV), Given(), SERVER, scaled(0.2))
    assert "WARNING" not in hurt.sentence("a CPU")
    light = fit(WorkloadSpec(CONV, thin=8.0), Given(thin=8.0), SERVER, scaled(0.2)).sentence("a CPU")
    assert light.startswith("WARNING: the load that was given is light")


class Events(ConsoleProgress):
    """Remembers which servers were started and measured."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.said: list[tuple[str, str]] = []

    def starting(self, title: str) -> None:
        self.said.append(("starting", title))

    def fitting(self, title: str) -> None:
        self.said.append(("fitting", title))

    def measuring(self, title: str, num_requests: int) -> None:
        self.said.append((f"measuring {num_requests}", title))


@pytest.mark.parametrize(
    ("names", "events"),
    [
        (("stock", "morphserve"),
         [("starting", "stock"), ("fitting", "stock"), ("measuring 3", "stock"), ("starting", "morphserve"),
          ("measuring 3", "morphserve")]),
        (("morphserve",),
         [("starting", "fit"), ("fitting", "fit"), ("starting", "morphserve"), ("measuring 3", "morphserve")]),
    ],
)  # fmt: skip
def test_no_start_is_paid_twice(tmp_path: Path, names: Sequence[str], events: list[tuple[str, str]]) -> None:
    """Guards: a server started for the fit and another for the stock run; runs on the load before fitting."""
    asked = comparison(tmp_path, *names)

    def fitted(url: str) -> Comparison:
        assert url.startswith("http://127.0.0.1:")
        what = asked.measurement
        few = replace(what.workload, requests=what.workload.requests[:3])
        return replace(asked, measurement=replace(what, workload=few), promise=Slo(3.0, 0.3))

    progress = Events()
    final, results = run_fitted(asked, fitted, progress)
    assert progress.said == events
    assert [result.name for result in results] == list(names)
    assert len(final.measurement.workload.requests) == 3
    assert all((result.directory / "result.json").is_file() for result in results)


def test_a_policy_of_promises_is_told_the_fitted_ones(tmp_path: Path) -> None:
    """Guards: kind slo keeping 150 ms where the report counts 300."""
    config = tmp_path / "slo.yaml"
    config.write_text("policy: {kind: slo, ttft_s: 1.0, target: 0.05}\nstep_times: t.json\n")
    assert derived_config(config, "slo", tmp_path, Slo(4.0, 0.3))["policy"] == {
        "kind": "slo", "ttft_s": 4.0, "tpot_s": 0.3, "target": 0.05,
    }  # fmt: skip
    assert derived_config(config, "slo", tmp_path)["policy"]["ttft_s"] == 1.0
    assert derived_config(config, "static_w8", tmp_path, Slo(4.0, 0.3))["policy"] == {"kind": "static", "level": "w8"}
    # Without a fit the YAML has the last word, and what it leaves out is what requests are judged by.
    unfitted = derived_config(config, "slo", tmp_path, None, Slo(4.0, 0.3))["policy"]
    assert unfitted == {"kind": "slo", "ttft_s": 1.0, "tpot_s": 0.3, "target": 0.05}
    config.write_text("kv: {max_num_blocks: 300}\n")
    for words in ((Slo(4.0, 0.3),), (None, Slo(4.0, 0.3))):
        derived = derived_config(config, "slo", tmp_path, *words)
        assert derived["policy"] == {"kind": "slo", "ttft_s": 4.0, "tpot_s": 0.3}
    assert derived_config(DEFAULT_CONFIG, "slo", tmp_path, None, Slo(4.0, 0.3))["policy"]["ttft_s"] == 4.0
    config.write_text("policy: {kind: threshold}\n")
    assert derived_config(config, "morphserve", tmp_path, Slo(4.0, 0.3), Slo()) == {"policy": {"kind": "threshold"}}


async def _one_round(fake: FakeServer) -> probe._Found:
    async with TestServer(fake.app()) as server, aiohttp.ClientSession() as session:
        client = ClientOptions(url=str(server.make_url("")).rstrip("/"), model="demo")
        found = probe._Found()
        await probe._round(probe._Sender(session, client, range(100, 900)), FAKE, found)
        return found


def test_the_probe_fits_into_the_cache_and_shares_no_prefix() -> None:
    """Guards: a step time measured while stock preempts, or on prompts that its cache already has."""
    fake = FakeServer()
    fake.everyone_here.set()
    asyncio.run(_one_round(fake))
    prompts = [tuple(body["prompt"]) for body in fake.bodies]
    assert len(set(prompt[:4] for prompt in prompts)) == len(prompts)
    assert {len(prompt) for prompt in prompts} >= {16, 40, 128}
    for count, prompt, answer in probe._batches(FAKE):
        assert count * -(-(prompt + answer) // 32) <= 48 and count <= 64
    assert max(count for count, *_ in probe._batches(FAKE)) == 48


def test_prefills_are_timed_with_prompts_that_a_quick_device_feels() -> None:
    """Guards: a device that prefills 120 tokens as fast as 16, for which prompts of thousands then cost nothing."""
    large = replace(FAKE, max_model_len=8192, num_blocks=4096)
    assert probe._long_prefill(large) == 1024 and probe._long_prefill(FAKE) == 128
    assert probe._long_prefill(replace(large, num_blocks=33)) == 512  # half of what the cache holds
    assert probe._long_prefill(replace(FAKE, max_model_len=64)) == 32


def test_blocks_that_vllm_has_found_are_asked_for() -> None:
    """Guards: a fit to 0 blocks where vLLM measures its memory; a server told to have none; one that does not say."""

    async def asked(path: str) -> int:
        async with TestServer(FakeServer().app()) as server:
            return await asyncio.to_thread(num_kv_blocks, str(server.make_url(path)).rstrip("/"))

    assert asyncio.run(asked("")) == 49
    with pytest.raises(ReplayError, match="HTTP Error 404.*Say with --num-blocks how many"):
        asyncio.run(asked("/nowhere"))
    measured = replace(FAKE, num_blocks=0)
    assert "--num-gpu-blocks-override" in FAKE.arguments(0, ())
    assert "--num-gpu-blocks-override" not in measured.arguments(0, ())
    with pytest.raises(ConfigError, match="num_blocks is 0: a simulated server"):
        replace(SERVER, num_blocks=0)
    with pytest.raises(ConfigError, match="num_blocks is -1, must be 0 or more"):
        replace(FAKE, num_blocks=-1)


def test_a_vllm_without_a_command_is_run_as_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: no server where vLLM lies on PYTHONPATH, as on a machine that nothing can be installed on."""
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    assert ServerOptions(model="m").command == (str(python), "-m", "vllm.entrypoints.cli.main", "serve")
    (tmp_path / "vllm").touch()
    assert ServerOptions(model="m").command == (str(tmp_path / "vllm"), "serve")


def test_a_server_that_fails_the_probe_is_named() -> None:
    """Guards: a fit to the times of error messages."""
    fake = FakeServer(behave=lambda body: "503" if len(body["prompt"]) == 8 else "ok")
    fake.everyone_here.set()
    with pytest.raises(ReplayError, match="of 4 requests that measure its steps failed, the first with http_503"):
        asyncio.run(_one_round(fake))


def outcome(count: int, prompt: int, answer: int, step: StepTime, offset_s: float) -> list[Outcome]:
    """Requests of a server with these step times that began in the same step."""
    first = step.seconds(count, count * (prompt - 1), count * prompt) + offset_s
    gaps = [step.seconds(count, 0, count * (prompt + 1 + number)) for number in range(answer - 1)]
    return [
        Outcome(i, 0.0, prompt, answer, 0.0, status="ok", ttft_s=first, latency_s=first + sum(gaps), itls_s=list(gaps))
        for i in range(count)
    ]


def test_the_probe_finds_what_made_the_times() -> None:
    """Guards: a coefficient that is lost, or credited with another's time."""
    true, offset_s = StepTime(0.020, 0.0012, 0.0009, 4e-6), 0.006
    found = probe._Found()
    for length in (16, 120):
        (one,) = outcome(1, length, 1, true, offset_s)
        found.prefills.setdefault(length, []).append(one.ttft_s)
    (lone,) = outcome(1, 40, 24, true, offset_s)
    found.ttfts.append(lone.ttft_s)
    found.add([lone], 40, 24)
    for count, prompt, answer in probe._batches(FAKE):
        batch = outcome(count, prompt, answer, true, offset_s)
        batch[-1].itls_s[5] = 2.0  # the machine did something else
        found.add(batch, prompt, answer)
    speed = probe._speed(found)
    for name in ("base_s", "per_seq_s", "per_prefill_token_s", "per_context_token_s"):
        assert getattr(speed.step, name) == pytest.approx(getattr(true, name), rel=0.1)
    assert speed.offset_s == pytest.approx(offset_s, abs=0.001)
    assert speed.lone_ttft_s == lone.ttft_s and speed.lone_tpot_s == pytest.approx(lone.itls_s[11], rel=0.01)


@pytest.mark.parametrize("steps", [(0.09, 0.02, 0.03, 0.01), (0.05, 0.5, 6.0, 0.1)])
def test_times_without_sense_still_make_a_machine(steps: tuple[float, ...]) -> None:
    """Guards: a demo that ends because the machine was busy while its steps were measured; a step of less than 0 s."""
    loads = ((1, 52), (4, 64), (48, 800), (4, 1400))
    gaps = {load: [seconds] for load, seconds in zip(loads, steps, strict=True)}
    step = probe._speed(probe._Found([0.2], gaps, {16: [0.5], 120: [0.3]})).step
    assert step.base_s >= 0.1 * steps[0]
    assert min(step.per_seq_s, step.per_prefill_token_s, step.per_context_token_s) >= 0.0


def test_the_fit_is_of_servers_that_are_started_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: --fit ignored, or a morphing server of somebody else's taken for stock."""
    arguments: list[Any] = ["--workload", str(CONV), "--url", "http://127.0.0.1:1", "--out", str(tmp_path / "o")]
    assert main([*arguments, "--tokenizer", "t", "--fit"]) == 1
    assert "Leave out --fit or --url." in capsys.readouterr().err
