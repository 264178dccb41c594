"""What `morphserve chaos` and `soak` need of the machine: which processes a server has, and a compiler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from morphserve.errors import MorphServeError
from morphserve.tools.chaos import processes
from morphserve.tools.chaos.libraries import failing_library
from morphserve.tools.soak.sample import usage_of

pytestmark = pytest.mark.cpu


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_ends_by_itself_is_no_orphan() -> None:
    """Guards: a verdict on Python's own helper, which a server that was killed leaves for a moment."""
    wait = "import sys; print(flush=True); sys.stdin.read()"
    helper = subprocess.Popen(
        [sys.executable, "-c", wait, "from multiprocessing.resource_tracker import main"],
        start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert helper.stdout is not None and helper.stdout.readline()
        assert processes.command_lines(helper.pid) == {} and not processes.has_ended(helper.pid)
    finally:
        helper.communicate()


@pytest.mark.parametrize(
    ("titles", "holders"),
    [
        (["python -m vllm", "VLLM::EngineCore"], [2]),  # its own worker
        (["python -m vllm", "VLLM::EngineCore", "VLLM::Worker_TP0", "VLLM::Worker_TP1"], [3, 4]),
    ],
)
def test_a_rank_is_who_holds_weights(titles: list[str], holders: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a fault in a rank that stops the engine core instead, or both."""
    monkeypatch.setattr(processes, "command_lines", lambda session: dict(enumerate(titles, 1)))
    assert processes.ranks(1) == holders


def test_each_process_is_counted_for_its_role(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a core that leaks, and whose memory stands under another's name, or under none."""
    me = os.getpid()
    for line, role in (("VLLM::EngineCore_DP0", "core"), ("VLLM::Worker_TP0", "rank"), ("python x", "other")):
        monkeypatch.setattr("morphserve.tools.soak.sample.command_lines", lambda server, line=line: {me: line})
        (usage,) = usage_of(0)
        assert usage.role == role and usage.rss_kib > 0 and usage.num_fds > 0
    assert [usage.role for usage in usage_of(me)] == ["api"]


def test_without_a_compiler_the_reason_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a traceback, or servers that run with nothing in front of libc and are called sound."""
    cc = tmp_path / "cc"
    cc.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    cc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MorphServeError, match=r"does not build .*no such header"):
        failing_library(tmp_path)
    cc.unlink()
    with pytest.raises(MorphServeError, match="no C compiler .*install one"):
        failing_library(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_processes_of_a_session() -> None:
    """Guards: an orphan that nobody sees, or a dead process that counts as one."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline()
    assert list(processes.command_lines(child.pid)) == [child.pid] and not processes.has_ended(child.pid)
    assert processes.with_title(child.pid, processes.WORKER) == []
    processes.send([child.pid], signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not buried
    assert processes.command_lines(child.pid) == {} and processes.has_ended(child.pid)
    child.communicate()
    assert processes.has_ended(child.pid)
    processes.send([child.pid], signal.SIGKILL)  # nobody is there: nothing happens
