"""A machine that is lent for minutes is taken away at any moment: what `morphserve gpu-check` has left by then."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("a", "b", "c", "d")
LINES = 12  # that each part prints, a figure behind each
PATIENCE_S = 60.0
MODULE = """
    import os, threading

    def run(bench):
        seen = os.open({seen!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        bench.note("x" * 1_000_000)  # so that a report is not written at once
        for number in range({lines}):
            print(f"{key} {{number}}")  # as a part does: it thinks of no buffer
            os.write(seen, f"{key} {{number}}\\n".encode())
            bench.figure(f"speed {{number}}", "us", float(number))
            threading.Event().wait(0.01)
        bench.require("it holds", True)
"""
COMMAND = """
    import sys
    from pathlib import Path
    from morphserve.tools.gpucheck.cli import check
    from morphserve.tools.gpucheck.frame import Options
    from morphserve.tools.gpucheck.parts import Part

    here = Path(sys.argv[1])
    parts = [Part(key, f"the part {{key}}", f"killed_{{key}}", 60.0, 1.0) for key in {parts!r}]
    sys.exit(check(parts, Options("cpu", True, environment={{"PYTHONPATH": str(here)}}), here / "out"))
"""


class Check:
    """A check of four parts in processes of its own, which say in a file of theirs how far they are."""

    def __init__(self, here: Path) -> None:
        here.mkdir()
        self.out, self._seen = here / "out", here / "seen"
        for key in PARTS:
            text = MODULE.format(seen=str(self._seen), lines=LINES, key=key)
            (here / f"killed_{key}.py").write_text(textwrap.dedent(text))
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(COMMAND.format(parts=PARTS)), str(here)],
            env=environment | {"PYTHONPATH": str(ROOT), "TMPDIR": str(here)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def seen(self) -> list[str]:
        """What parts have printed."""
        return self._seen.read_text().splitlines() if self._seen.exists() else []

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition() and self._process.poll() is None:
            assert time.monotonic() < end, f"stands still at {self.seen()[-1:]}"
            time.sleep(0.0005)  # a report is written within milliseconds

    def kill(self) -> None:
        """End all of it, as when power fails: the part, too, which is a session of its own."""
        pid = self._process.pid
        if self._process.poll() is not None:  # it was quicker
            return
        os.kill(pid, signal.SIGSTOP)  # so that it starts and reaps nothing while we look
        os.waitpid(pid, os.WUNTRACED)
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        os.killpg(pid, signal.SIGKILL)
        self._process.wait()

    def files(self, name: str) -> dict[str, int]:
        """A file of the report and what is beside it in its name, with what changes when one is written to."""
        entries = [entry for entry in os.scandir(self.out) if entry.name.startswith(name)]
        # What is partial may be gone before we ask.
        return {entry.name: 0 if entry.name.endswith(".partial") else entry.stat().st_mtime_ns for entry in entries}


def look_at(check: Check) -> int:
    """Hold what is there to what must be, and return how many parts the report has."""
    names = {file.name for file in check.out.iterdir()} if check.out.is_dir() else set()
    whole = {name for name in names if not name.endswith(".partial")}  # those are what they are called
    assert whole <= {"gpu_check.json", "gpu_check.md", "gpu_check.log"}
    seen = check.seen()
    begun = [key for key in PARTS if f"{key} 0" in seen]
    ended = begun[:-1]  # the next part begins when the one before it is in the report
    if "gpu_check.json" not in names:
        assert not seen and "gpu_check.md" not in names
        return 0
    document = json.loads((check.out / "gpu_check.json").read_text())
    keys = [part["part"] for part in document["parts"]]
    assert keys in (ended, begun) and keys + document["not_run"] == list(PARTS)
    for part in document["parts"]:
        figures = [(figure["name"], figure["median"]) for figure in part["findings"]["figures"]]
        assert part["status"] == "ok" and part["findings"]["finished"], part["reason"]
        assert figures == [(f"speed {number}", float(number)) for number in range(LINES)]
    if "gpu_check.md" in names:
        text = (check.out / "gpu_check.md").read_text()
        told = [key for key in PARTS if f"| {key} | the part {key} | ok (dry) |" in text]
        assert told in (keys, keys[:-1])  # taken away between the two files
        assert text.count("| speed ") == LINES * len(told) and text.endswith("\n")
        assert ("never reached: " + ", ".join(PARTS[len(told) :]) in text) == (len(told) < len(PARTS))
    else:
        assert not keys
    assert (check.out / "gpu_check.log").read_text().splitlines()[: len(seen)] == seen
    return len(keys)


def test_what_is_left_when_the_machine_is_taken_away(tmp_path: Path) -> None:
    """Guards: figures of hours in a report cut in half, or still to be written; a log that stays in a buffer."""
    chance = random.Random(9)
    moments = [chance.randrange(LINES * len(PARTS)) for _ in range(6)]
    lengths = []
    for number, moment in enumerate(moments):
        check = Check(tmp_path / f"anywhere{number}")
        check.wait_for(lambda check=check, moment=moment: len(check.seen()) >= moment)  # type: ignore[misc]
        time.sleep(chance.random() * 0.05)  # somewhere between this line and some lines on
        check.kill()
        lengths.append(look_at(check))
    for number, name in enumerate(("gpu_check.json", "gpu_check.md") * 2, 1):
        check = Check(tmp_path / f"writing{number}")
        check.wait_for(lambda check=check, lines=LINES * number: len(check.seen()) >= lines)  # type: ignore[misc]
        before = check.files(name)
        check.wait_for(lambda check=check, before=before, name=name: check.files(name) != before)  # type: ignore[misc]
        check.kill()
        lengths.append(look_at(check))
    assert len(set(lengths)) > 2, lengths
