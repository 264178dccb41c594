"""`scripts/tune.py` from its options to its files."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from cpu import sim_world
from cpu.tuning_world import burst, write_inputs

from morphserve.config import load_config
from morphserve.tools.sim import Simulated, simulate
from morphserve.tools.tune import main
from policies import LayerMove, StepTimes, ThresholdConfig

pytestmark = pytest.mark.cpu

OPTIONS = ["--trials", "24", "--jobs", "1", "--quiet", "--slo-ttft-s", "0.5", "--slo-tpot-ms", "60"]


def arguments(files: dict[str, Path], out: Path, *more: str, held_out: bool = True) -> list[str]:
    """A whole command line."""
    names = {"--config": "config.yaml", "--space": "space.yaml", "--step-times": "step_times.json"}
    inputs = [word for option, name in names.items() for word in (option, files[name])]
    windows = ["--dev", files["dev"]] + (["--held-out", files["held_out"]] if held_out else [])
    return [str(word) for word in (*inputs, *windows, "--out", out, *OPTIONS, *more)]


def tune(capsys: pytest.CaptureFixture[str], argv: list[str]) -> tuple[dict[str, Any], str]:
    """Its JSON and its stderr."""
    assert main(argv) == 0
    output = capsys.readouterr()
    return json.loads(output.out.splitlines()[-1]), output.err


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Its stderr; nothing else must have been said."""
    assert main(argv) == 1
    output = capsys.readouterr()
    assert output.out == "" and "Traceback" not in output.err
    return output.err


def test_a_study_leaves_policies_that_can_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: the YAML is not the policy that was scored, does not load, or the report forgets a part."""
    files, out = write_inputs(tmp_path), tmp_path / "out"
    document, err = tune(capsys, arguments(files, out, "--constraints", "0,5,100"))
    assert {path.name for path in out.iterdir()} >= {
        "study.journal", "trials.csv", "pareto.png", "importance.png", "report.md", "best_le_100pct.yaml"
    }  # fmt: skip
    with (out / "trials.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["trial"]) for row in rows] == list(range(24))
    given = load_config(files["config.yaml"])
    picked = [best for best in document["best"] if best["trial"] is not None]
    assert picked
    for best in picked:
        config = load_config(out / best["file"])
        row = rows[best["trial"]]
        assert isinstance(config.policy, ThresholdConfig)
        assert config.policy.degrade_above == pytest.approx(float(row["policy.degrade_above"]))
        assert config.policy.max_level == row["policy.max_level"]
        assert config.ladder == given.ladder
        assert float(row["dev_violation_rate"]) <= best["max_violation_rate"]
        assert float(row["held_out_violation_rate"]) == best["held_out"]["violation_rate"]
        text = (out / best["file"]).read_text()
        assert text.startswith("# Tuned") and "# held-out: " in text and f"Trial {best['trial']} of 24" in text
    assert [anchor["name"] for anchor in document["anchors"]] == ["stock", "static_w8", "static_w4", "current"]
    assert all(anchor["held_out"] is not None for anchor in document["anchors"])
    report = (out / "report.md").read_text()
    parts = ("Simulated", "static_w8", "| current |", "held_out.jsonl", "best_le_100pct.yaml")
    assert all(part in report for part in (*parts, *document["warnings"]))
    assert err.count("warning: ") == len(document["warnings"])


def test_run_again_is_the_same_and_simulates_no_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: the finished study is searched anew, or a report depends on when it was made."""
    files, out = write_inputs(tmp_path), tmp_path / "out"
    argv = arguments(files, out)
    first = tune(capsys, argv)
    kept = {name: (out / name).read_bytes() for name in ("trials.csv", "report.md", "study.journal")}
    monkeypatch.setattr("morphserve.tools.tune.search.Search._run_batch", None)
    assert tune(capsys, argv) == first
    assert {name: (out / name).read_bytes() for name in kept} == kept


def test_the_command_of_a_report_makes_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: the command that a report is said to come from leaves out an option that decides."""
    argv = arguments(
        write_inputs(tmp_path), tmp_path / "a", "--trials", "3", "--num-blocks", "40", "--async-scheduling",
        "--constraints", "0.5,50",
    )  # fmt: skip
    document, _ = tune(capsys, argv)
    program, command, *words = shlex.split(document["made"]["command"])
    assert (program, command) == ("morphserve", "tune") and "--async-scheduling" in words
    again, _ = tune(capsys, [*words, "--out", str(tmp_path / "b"), "--jobs", "1", "--quiet"])
    assert {**again, "report": None, "study": None} == {**document, "report": None, "study": None}


def test_quiet_traffic_needs_no_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a user is sold a tuned policy for traffic that the stock server serves in time."""
    files = write_inputs(tmp_path)
    files["dev"] = burst(tmp_path / "calm.jsonl", num_requests=6, every_s=1.0)
    document, err = tune(capsys, arguments(files, tmp_path / "out", "--trials", "5"))
    assert "warning: stock dominates best_le_0pct" in err and "No morphing is needed there" in err
    assert any("stock dominates" in warning for warning in document["warnings"])


def test_a_study_is_bound_to_its_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: an --out is used again with other traces, times or seeds, and its trials are mixed with new ones."""
    files, out = write_inputs(tmp_path), tmp_path / "out"
    argv = arguments(files, out, "--trials", "3")
    tune(capsys, argv)
    assert "seed: 0 in the study, 1 now" in refused(capsys, [*argv, "--seed", "1"])
    burst(files["dev"], num_requests=23)
    message = refused(capsys, argv)
    assert "dev.0: " in message and "held_out.0" not in message and "config" not in message
    write_inputs(tmp_path)
    space = yaml.safe_load(files["space.yaml"].read_text())
    space["threshold"]["policy.target_usage"]["high"] = 0.8
    files["space.yaml"].write_text(yaml.safe_dump(space))
    assert "space.policy.target_usage.high: 0.9 in the study, 0.8 now" in refused(capsys, argv)


def test_step_times_without_a_format_of_the_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: every trial is pruned, one after the other, for want of a figure that none of them can have."""
    files = write_inputs(tmp_path)
    known = sim_world.CALIBRATION
    formats = {fmt: time for fmt, time in known.times.formats.items() if fmt != "w4"}
    without = type(known)(StepTimes(formats, LayerMove(0.001, 0.001)), known.rank, known.num_layers, known.block_size)
    without.save(files["step_times.json"])
    message = refused(capsys, arguments(files, tmp_path / "out"))
    assert "'w4'" in message and "morphserve calibrate" in message


def test_a_ladder_without_quality_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: what was never measured counts as free, and the deepest level wins."""
    files = write_inputs(tmp_path)
    config = yaml.safe_load(files["config.yaml"].read_text())
    config["ladder"]["expected_kl"] = {"w8": 0.03}
    files["config.yaml"].write_text(yaml.safe_dump(config))
    message = refused(capsys, arguments(files, tmp_path / "out"))
    assert "measured quality cost" in message and "ladder.expected_kl" in message


def test_a_space_without_a_single_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a study in which every trial was refused ends in an empty report, or a traceback."""
    space = {
        "policy.degrade_above": {"low": 0.1, "high": 0.2},
        "policy.target_usage": {"low": 0.8, "high": 0.9},
    }
    message = refused(capsys, arguments(write_inputs(tmp_path, space), tmp_path / "out", "--trials", "4"))
    assert "none of 4 trials" in message and "4 times: policy" in message and "Narrow the space" in message


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--trials", "0"], "--trials is 0, must be at least 1"),
        (["--slo-ttft-s", "0"], "--slo-ttft-s is 0, must be a number above 0"),
        (["--max-model-len", "64"], "exceed max_model_len"),
        (["--num-blocks", "5"], "cannot hold one request"),
        (["--config", "gone.yaml"], "gone.yaml: No such file"),
        (["--step-times", "gone.json"], "morphserve calibrate"),
        (["--held-out", "gone.jsonl"], "gone.jsonl: No such file"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str) -> None:
    """Guards: a traceback, or a study of what nobody asked for."""
    assert words in refused(capsys, arguments(write_inputs(tmp_path), tmp_path / "out", *more))


def test_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: Ctrl-C ends in a traceback, or loses the trials that were there."""
    files, out = write_inputs(tmp_path), tmp_path / "out"
    simulated = 0

    def stopped(*args: Any, **options: Any) -> Simulated:
        nonlocal simulated
        simulated += 1
        if simulated > 20:
            raise KeyboardInterrupt
        return simulate(*args, **options)

    monkeypatch.setattr("morphserve.tools.tune.evaluate.simulate", stopped)
    assert main(arguments(files, out)) == 130
    assert "run again to go on" in capsys.readouterr().err
    monkeypatch.undo()
    resumed, _ = tune(capsys, arguments(files, out))
    whole, _ = tune(capsys, arguments(files, tmp_path / "other"))
    assert (out / "trials.csv").read_bytes() == (tmp_path / "other" / "trials.csv").read_bytes()
    assert resumed["best"] == whole["best"] and resumed["front"] == whole["front"]


def test_without_held_out_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a report without a held-out column reads as if there were one."""
    files = write_inputs(tmp_path)
    document, err = tune(capsys, arguments(files, tmp_path / "out", "--trials", "4", held_out=False))
    assert "no held-out window" in err
    assert all(anchor["held_out"] is None for anchor in document["anchors"])


def test_slo_policies_are_tuned_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: the policy for which step times matter most is written without a place to find them."""
    space = {"policy.target": {"low": 0.001, "high": 0.3, "log": True}, "policy.dwell_s": {"low": 0.0, "high": 3.0}}
    files = write_inputs(tmp_path, space, kind="slo", ttft_s=0.5, tpot_s=0.06)
    tune(capsys, arguments(files, tmp_path / "out", "--trials", "4", "--constraints", "100"))
    config = load_config(tmp_path / "out" / "best_le_100pct.yaml")
    assert config.policy.kind == "slo" and config.step_times == files["step_times.json"]
