"""`scripts/replay.py --simulate`, and workloads by seed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu.sim_world import CALIBRATION

from morphserve.tools.bench import main
from morphserve.tools.workload import WorkloadError, WorkloadSpec, load_workload
from morphserve.tools.workload.synthetic import generate, parse_synthetic

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "policies" / "yaml" / "demo.yaml"


@pytest.fixture
def step_times(tmp_path: Path) -> Path:
    CALIBRATION.save(tmp_path / "times.json")
    return tmp_path / "times.json"


def replay(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, Any], str]:
    """Exit status, the document on stdout, and stderr."""
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if code == 0 else {}, err


def test_runs_side_by_side_make_a_report(
    tmp_path: Path, step_times: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a simulation that needs a model, lacks a run, or is taken for a measurement."""
    careful = tmp_path / "careful.yaml"
    careful.write_text(DEMO.read_text() + "  dwell_s: 4\n")
    code, document, err = replay(
        capsys, "--workload", ROOT / "scripts" / "workloads" / "hybB.jsonl", "--simulate", "--step-times", step_times,
        "--compare", "stock,morphserve,static_w8,careful", "--config", DEMO, "--policy", f"careful={careful}",
        "--out", tmp_path / "out", "--quiet",
    )  # fmt: skip
    assert code == 0, err
    rates = {run["name"]: run["violation_rate"] for run in document["runs"]}
    assert list(rates) == ["stock", "morphserve", "static_w8", "careful"]
    assert rates["stock"] > 0.3 > 0.05 > rates["morphserve"]
    page = Path(document["report"]).read_text(encoding="utf-8")
    assert '<p class="headline">Simulated: SLO violations' in page
    assert "simulated, no server was started" in page and "How it was simulated" in page
    assert "load average" not in page and "dwell_s: 4" in page
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["headline"].startswith("Simulated: ")
    result = json.loads((tmp_path / "out" / "careful" / "result.json").read_text())
    assert result["setup"]["simulated"].startswith(f"step times {step_times}")
    assert len(result["ttfts"]) == 92 and result["morphserve_status"]["level"] == 0


def test_a_workload_by_seed_needs_no_file(
    tmp_path: Path, step_times: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: synthetic traffic that only the library can make."""
    spec = "synthetic:3,rate=1.5,duration=30"
    code, document, err = replay(
        capsys, "--workload", spec, "--input-clip", "8,120", "--output-clip", "4,200", "--simulate",
        "--step-times", step_times, "--out", tmp_path / "out", "--quiet",
    )  # fmt: skip
    assert code == 0, err
    assert document["workload"] == spec and document["runs"][0]["sent"] > 10


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "o"], "--simulate needs --step-times"),
        (["--step-times", "none.json", "--out", "o"], "none.json: No such file"),
        (["--step-times", "x", "--out", "o", "--url", "http://x"], "leave out --url"),
        (["--step-times", "x", "--out", "o", "--compare", "other"], "choose from stock, morphserve"),
        (["--step-times", "x", "--out", "o", "--policy", "stock=x.yaml"], "none of stock"),
        (["--step-times", "x", "--out", "o", "--policy", "../a=x.yaml"], "a name is of letters"),
        (["--step-times", "x", "--out", "o", "--policy", "a=x", "--policy", "a=y"], "give each name once"),
        (["--step-times", "x", "--out", "o", "--policy", "a=none.yaml", "--compare", "a"], "none.yaml"),
    ],
)
def test_bad_options_are_explained(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a traceback, or an option that is silently ignored."""
    monkeypatch.chdir(tmp_path)
    code, _, err = replay(capsys, "--workload", "synthetic:1,duration=5,output=9,input=9", "--simulate", *args)
    assert code == 1 and message in err


def test_options_of_a_simulation_are_refused_without_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Guards: a user who forgot --simulate measures real servers for an hour, at settings that do nothing."""
    code, _, err = replay(
        capsys, "--workload", "synthetic:1,duration=5", "--out", tmp_path, "--model", "m", "--sim-speed", "1.1",
        "--max-num-batched-tokens", "512",
    )  # fmt: skip
    assert code == 1 and "--sim-speed, --max-num-batched-tokens is of a simulation. Add --simulate" in err


def test_synthetic_traffic_is_what_it_says() -> None:
    """Guards: a rate, a burstiness or lengths that differ from what was asked for; another draw for the same seed."""
    text = "synthetic:5,duration=20000,rate=2,cv=3,burst=1,input=64,output=100,output_sigma=0.5,gaps="
    for kind in ("gamma", "weibull"):
        spec = parse_synthetic(text + kind)
        requests = generate(spec)
        assert requests == generate(spec)
        gaps = np.diff([r.arrival_s for r in requests])
        assert len(requests) == pytest.approx(40_000, rel=0.05)
        assert np.std(gaps) / np.mean(gaps) == pytest.approx(3, rel=0.1)
        assert np.median([r.input_tokens for r in requests]) == pytest.approx(64, rel=0.05)
        assert np.std(np.log([r.output_tokens for r in requests])) == pytest.approx(0.5, rel=0.05)


def test_bursts_are_faster_than_calm() -> None:
    """Guards: bursts that are none, or a mean rate that bursts raise."""
    steady, bursty = (
        np.histogram([r.arrival_s for r in generate(parse_synthetic(f"synthetic:5,duration=5000,cv=1,burst={burst}"))],
                     np.arange(0, 5001, 10))[0]
        for burst in (1, 10)
    )  # fmt: skip
    assert steady.sum() == pytest.approx(bursty.sum(), rel=0.1)
    assert np.var(bursty) > 3 * np.var(steady)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("synthetic:x", "seed 'x' is no whole number"),
        ("synthetic:-1", "seed is -1, must be 0 or more"),
        ("synthetic:1,speed=2", "unknown key 'speed'; known are burst"),
        ("synthetic:1,rate=fast", "rate is 'fast', must be a number"),
        ("synthetic:1,rate=-1", "rate is -1, must be"),
        ("synthetic:1,cv=nan", "cv is nan, must be"),
        ("synthetic:1,gaps=pareto", "must be gamma or weibull"),
        ("synthetic:1,rate=9999,duration=1e6", "at most 1e7"),
    ],
)
def test_bad_synthetic_workloads_are_refused(text: str, message: str) -> None:
    """Guards: a typo that leaves the default in force."""
    with pytest.raises(WorkloadError, match=message):
        load_workload(WorkloadSpec(Path(text)))


def test_steps_scatter_as_they_did_when_they_were_timed(
    tmp_path: Path, step_times: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a simulated machine steadier than the real one, on which every prediction comes true."""
    times = replace(CALIBRATION.times, residuals={"base": 0.1, "w8": 0.2, "w4": 0.3})
    replace(CALIBRATION, times=times).save(tmp_path / "scattered.json")
    found = []
    for file, more in ((step_times, ()), (tmp_path / "scattered.json", ()), (step_times, ("--sim-noise", "0.2"))):
        code, _, err = replay(
            capsys, "--workload", "synthetic:1,duration=20", "--simulate", "--step-times", file, "--out",
            tmp_path / "o", "--quiet", "--input-clip", "8,100", "--output-clip", "8,200", *more,
        )  # fmt: skip
        assert code == 0, err
        result = json.loads((tmp_path / "o" / "stock" / "result.json").read_text())
        found.append((result["setup"]["step_noise"], result["ttfts"]))
    assert [noise for noise, _ in found] == [0.0, pytest.approx(0.2), 0.2]
    assert found[0][1] != found[1][1] and found[1][1] == pytest.approx(found[2][1])
