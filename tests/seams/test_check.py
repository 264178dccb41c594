"""`python -m morphserve check` says whether a server could start here, and why not, without a model."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("vllm._custom_ops")
pytest.importorskip("vllm._C")

from morphserve import check  # noqa: E402
from morphserve.__main__ import main  # noqa: E402
from morphserve.errors import ConfigError  # noqa: E402
from morphserve.integration import checks, seams  # noqa: E402
from quant_layers import CANDIDATES, FORMATS, KernelReport, choose  # noqa: E402
from quant_layers.kernels import W8A8Onednn, W8A8Vnni  # noqa: E402


def document(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = main(["check", "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_fresh_process_prints_one_document() -> None:
    """Guards: vLLM's log lines in front of the JSON, operators that nobody has loaded, rows or kernels left out."""
    done = subprocess.run(
        [sys.executable, "-m", "morphserve", "check", "--json"], capture_output=True, text=True, check=False,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "DEBUG"},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["ok"] and found["problems"] == [], done.stderr[-2000:]
    assert found["vllm"] == importlib.metadata.version("vllm") and found["device"] == "cpu"
    assert [row["kernel"] for row in found["kernels"]] == [make.name for make in CANDIDATES]
    assert all(row["runs"] != bool(row["reason"]) for row in found["kernels"])
    assert found["formats"] == {fmt: choose(fmt).name for fmt in FORMATS}
    assert {row["name"] for row in found["seams"] if row["holds"]} == {s.name for s in seams.SEAMS} | {"version"}


def test_the_table_says_which_kernel_runs_and_why_another_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a reason lost in the markup of a table, or a default that is not the one a server would choose."""
    if why := W8A8Onednn().unavailable():
        pytest.skip(why)
    monkeypatch.setattr(W8A8Vnni, "unavailable", lambda self: "this CPU has no [vnni] unit")
    assert main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (vnni,) = (line for line in lines if "w8a8_vnni" in line)
    (onednn,) = (line for line in lines if "w8a8_onednn" in line)
    assert vnni.split()[:3] == ["w8", "w8a8_vnni", "no"] and "this CPU has no [vnni] unit" in vnni
    assert onednn.split() == ["w8", "w8a8_onednn", "yes,", "by", "default"]
    assert any(line.startswith("MorphServe can run here") and line.endswith("w8, w4, fp8") for line in lines)


def refuse_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ConfigError("device 'tpu': not served")

    monkeypatch.setattr(checks, "check_platform", refuse)


def take_vllm_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)


def move_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    row = seams.Seam("moved", "vllm.config:NoSuchClass", (), "test")
    monkeypatch.setattr(seams, "SEAMS", (*seams.SEAMS, row))


def fail_all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, KernelReport]:
        return {make.name: KernelReport(make.name, make.format, False, "planted", 2.0) for make in CANDIDATES}

    monkeypatch.setattr(check, "probe", fail)


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (refuse_device, "device 'tpu'"),
        (take_vllm_away, "vLLM is not installed"),
        (move_a_seam, "1 of "),
        (fail_all_kernels, "no kernel runs any format with bfloat16"),
    ],
)
def test_what_stops_a_server_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], plant: Any, said: str
) -> None:
    """Guards: exit status 0, or a traceback, where a server would refuse to start."""
    plant(monkeypatch)
    status, found = document(capsys)
    assert status == 1 and not found["ok"]
    (problem,) = found["problems"]
    assert said in problem
    assert main(["check"]) == 1
    assert f"can NOT run here: {problem}" in capsys.readouterr().out


def test_a_format_of_the_default_ladder_without_a_kernel_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: `can run`, and then the default settings do not."""
    reports = {make.name: KernelReport(make.name, make.format, make.format == "w8", "", 0.5) for make in CANDIDATES}
    monkeypatch.setattr(check, "probe", lambda *_: reports)
    assert main(["check"]) == 0
    assert "no kernel runs w4, so list `ladder.steps` without it" in capsys.readouterr().out
