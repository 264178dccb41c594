"""Processes that tools start: they end with the tool, also where that is killed outright."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

# Writes its id into a file, and waits for ever.
_CHILD = "import os, sys, time; open(sys.argv[1], 'x').write(f'{os.getpid()}\\n'); time.sleep(600)"
_BEGIN = "import sys; from pathlib import Path; command = [sys.executable, '-c', sys.argv[1], sys.argv[2]]\n"
_TOOLS = {
    "engine": "from morphserve.tools.apart import run_apart\nrun_apart(command, '', '', print)",
    "server": """
from morphserve.tools.bench.load.server import ServerOptions, serve
with serve(ServerOptions(model="", command=tuple(command)), Path(sys.argv[2] + ".log")): pass
""",
    "engine of a part": """
from morphserve.tools.gpucheck.engines import EngineProcess
file = Path(sys.argv[2] + ".py")
file.write_text(f"import sys; sys.argv = ['', {sys.argv[2]!r}]; {sys.argv[1]}")
if __name__ == "__main__": EngineProcess("runpy:run_path", {"path_name": str(file)}).wait_ready(600)
""",
    "part": """
from morphserve.tools.gpucheck import frame
frame._supervise(command, frame.Options(), Path(sys.argv[2] + ".log"), 600)
""",
}


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that nobody has asked how it ended does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.parametrize("name", _TOOLS)
def test_a_child_ends_with_a_tool_that_is_killed(name: str, tmp_path: Path) -> None:
    """Guards: processes that hold memory and ports after their tool was killed, by want of memory for one."""
    told = tmp_path / "pid"
    tool = subprocess.Popen([sys.executable, "-c", _BEGIN + _TOOLS[name], _CHILD, str(told)])
    try:
        wait_until(lambda: tool.poll() is None and told.exists() and told.read_text(encoding="utf-8").endswith("\n"))
        pid = int(told.read_text(encoding="utf-8"))
        assert is_alive(pid)
        tool.kill()
        wait_until(lambda: not is_alive(pid))
    finally:
        tool.kill()
        tool.wait()
        if told.exists() and is_alive(int(told.read_text(encoding="utf-8"))):
            os.kill(int(told.read_text(encoding="utf-8")), signal.SIGKILL)
