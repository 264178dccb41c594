"""scripts/gpu_session.py on a machine without a device: what is unpacked, what vLLM would find, what lanes leave."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from morphserve.tools.gpucheck.machine import missing_device

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/gpu_session.py"


@pytest.fixture
def session() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_session", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_archive_is_unpacked_once(session: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: minutes of a lent machine spent twice; a path that lacks one of the three directories."""
    (tmp_path / "made/vllm").mkdir(parents=True)
    (tmp_path / "made/vllm/__init__.py").write_text("")
    archive = tmp_path / "vllm.tar.xz"
    with tarfile.open(archive, "w:xz") as made:
        made.add(tmp_path / "made", arcname=".")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = session.environment(tmp_path / "site", archive)
    packages, dist, root = map(Path, found["PYTHONPATH"].split(os.pathsep))
    assert (packages / "vllm/__init__.py").is_file() and dist.is_dir() and root == ROOT
    assert found["MORPHSERVE_UNPROVEN_CUDA"] == found["HF_HUB_OFFLINE"] == "1"
    archive.unlink()
    assert session.environment(tmp_path / "site", archive) == found


def test_vllm_finds_the_plugin_without_an_installation(session: ModuleType, tmp_path: Path) -> None:
    """Guards: an engine on a lent GPU that starts without the plugin, since nothing but pip had named it."""
    session.write_distribution(tmp_path)
    (found,) = distributions(path=[str(tmp_path)])
    entries = {(entry.group, entry.value) for entry in found.entry_points}
    assert found.metadata["Name"] == "morphserve"
    assert ("vllm.general_plugins", "morphserve.plugin:register") in entries
    assert ("vllm.endpoint_plugins", "morphserve.integration.server.metrics:make_endpoint") in entries


@pytest.mark.skipif(missing_device() is None, reason="there is a device: lanes would run on it")
def test_each_lane_leaves_a_report_of_its_own(tmp_path: Path) -> None:
    """Guards: two lanes that write over each other; a session that calls success what has not run."""
    command = [sys.executable, str(SCRIPT), "--minutes", "1", "--site", str(tmp_path / "site"), "--lane", "t1,t4"]
    done = subprocess.run(
        [*command, "--lane", "t6", "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1 and told["lanes"] == {"t1,t4": 3, "t6": 3}, done.stderr
    parts = [
        [part["part"] for part in json.loads((tmp_path / f"out/lane{n}/gpu_check.json").read_text())["parts"]]
        for n in (1, 2)
    ]
    assert parts == [["t1", "t4"], ["t6"]] and (tmp_path / "out/lane2/gpu_check.log").is_file()
    assert "t6 skipped" in done.stdout and "no NVIDIA device" in done.stdout


def test_commands_follow_the_lanes(tmp_path: Path) -> None:
    """Guards: commands that are not run, or not reported; a session that calls a failed command success."""
    command = [sys.executable, str(SCRIPT), "--minutes", "1", "--site", str(tmp_path / "site")]
    done = subprocess.run(
        [*command, "--run=--help", "--run=simulate --step-times nowhere.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1 and told["runs"][0] == 0 and told["runs"][1] != 0, done.stderr
    assert "$ morphserve simulate --step-times nowhere.json" in done.stdout
    nothing = subprocess.run(command, capture_output=True, text=True, check=False)
    assert nothing.returncode == 2 and "nothing to do: give --lane or --run" in nothing.stderr


class Hung:
    """A process that ends at the second signal alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.waits: list[float | None] = []
        self.signals: list[int] = []

    def wait(self, timeout: float | None = None) -> int:
        self.waits.append(timeout)
        if timeout is not None:
            raise subprocess.TimeoutExpired("morphserve", timeout)
        return -9

    def terminate(self) -> None:
        self.signals.append(signal.SIGTERM)

    def kill(self) -> None:
        self.signals.append(signal.SIGKILL)


def test_a_command_out_of_time_is_asked_to_end_then_killed(
    session: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a command that holds a lent machine until it is taken away; servers that nobody stops."""
    hung = Hung()
    monkeypatch.setattr(session.subprocess, "Popen", lambda *args, **kwargs: hung)
    assert session.run("watch", {}, 12.0) == -9
    assert hung.waits == [12.0, 60.0, None] and hung.signals == [signal.SIGTERM, signal.SIGKILL]
    assert session.run("watch", {}, 0.0) == 1 and len(hung.waits) == 3
    assert "out of time after 12 s" in capsys.readouterr().out
