"""`prepare: when_idle`: what prepares gives way to any request, backs off after failures, and ends with the server."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from morphserve.config import parse_config
from morphserve.errors import ConfigError, IllegalTransition, ProfilingError
from morphserve.prepared import TAKEN, Background, TakenError, WhenIdle, background, lock, take_host, take_model
from morphserve.prepared.when_idle import QUIET_S, Phase
from morphserve.tools.prepare import beside_server

pytestmark = pytest.mark.cpu


class FakeChild:
    """A child whose end a test decides."""

    pid = 4711

    def __init__(self) -> None:
        self.code: int | None = None
        self.lines: list[str] = []
        self.was_told = self.was_waited_for = False

    def poll(self) -> int | None:
        return self.code

    def end(self) -> None:
        self.was_told = True

    def end_now(self) -> None:
        self.end()
        self.code, self.was_waited_for = 130, True

    def said(self) -> list[str]:
        return self.lines


class World:
    """A server that is idle or not, a clock, and the children that it has started."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.now_s = 1000.0
        self.children: list[FakeChild] = []
        self.refuses = ""
        self.idle = WhenIdle(self.start, "m", lambda: self.now_s)
        self._caplog = caplog

    def start(self) -> FakeChild:
        if self.refuses:
            raise OSError(self.refuses)
        assert all(child.code is not None for child in self.children), "two at once"
        self.children.append(FakeChild())
        return self.children[-1]

    def quiet(self, seconds: float) -> None:
        """Let time pass, with a tick at its end."""
        self.now_s += seconds
        self.idle.tick(False)

    def request(self) -> None:
        self.idle.tick(True)

    def ends(self, code: int, *lines: str) -> None:
        """Let the child that runs end by itself."""
        self.children[-1].code, self.children[-1].lines = code, list(lines)
        self.idle.tick(False)

    def logged(self) -> list[str]:
        found = [f"{record.levelname} {record.message}" for record in self._caplog.records]
        self._caplog.clear()
        return found


@pytest.fixture
def world(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr("morphserve.prepared.when_idle.logger", logging.getLogger("test.when_idle"))
    caplog.set_level(logging.INFO, "test.when_idle")
    return World(caplog)


def test_begins_only_after_minutes_without_a_request(world: World) -> None:
    """Guards: a child that is started between two requests, or before the server was ever asked anything."""
    world.quiet(QUIET_S - 1)
    world.request()
    world.quiet(QUIET_S - 1)
    assert not world.children and world.idle.phase is Phase.IDLE
    assert world.idle.as_json() == {"state": "idle", "part": "", "note": "", "begins_in_s": 1.0}
    world.quiet(1)
    assert len(world.children) == 1 and world.idle.phase is Phase.RUNNING
    world.quiet(10 * QUIET_S)
    assert len(world.children) == 1, "one child at a time"
    (said,) = world.logged()
    assert said.startswith("INFO") and "4711" in said


def test_a_request_ends_it_and_the_next_quiet_goes_on(world: World) -> None:
    """Guards: traffic that pays for a child; a second one beside one that still ends; a stop that counts as failure."""
    world.quiet(QUIET_S)
    (child,) = world.children
    child.lines = ["input scales: 3 of 30", "a library's remark"]
    assert world.idle.as_json()["part"] == "input scales: 3 of 30"
    world.request()
    assert child.was_told and not child.was_waited_for and world.idle.as_json()["state"] == "stopping"
    world.quiet(2 * QUIET_S)
    assert len(world.children) == 1, "the last one is not gone yet"
    world.request()
    world.ends(130)
    assert world.idle.phase is Phase.IDLE
    world.quiet(QUIET_S - 1)
    assert len(world.children) == 1
    world.quiet(1)
    assert len(world.children) == 2
    begins, stops, again = world.logged()
    assert all(line.startswith("INFO") for line in (begins, stops, again)) and "input scales: 3 of 30" in stops


def test_what_is_done_is_done_once(world: World) -> None:
    """Guards: a server that prepares again and again what is there; nobody hears where it is."""
    world.quiet(QUIET_S)
    world.ends(0, "prepared in 7 s: m", "profile /somewhere, 12 levels", "serve it with: vllm serve m")
    world.quiet(1000 * QUIET_S)
    assert len(world.children) == 1 and world.idle.as_json()["state"] == "done"
    assert "profile /somewhere, 12 levels" in world.logged()[-1]


def test_what_ends_well_while_it_is_stopped_is_done(world: World) -> None:
    """Guards: a request that comes in the last moment makes the server prepare what is there."""
    world.quiet(QUIET_S)
    world.request()
    world.ends(0)
    assert world.idle.phase is Phase.DONE


def test_failures_back_off(world: World) -> None:
    """Guards: what fails is tried again at every idle moment; a failure with a library's words instead of its cause."""
    waits = []
    for _ in range(8):
        begun = len(world.children)
        while len(world.children) == begun:
            world.quiet(60)
        waits.append(world.now_s)
        world.ends(1, "morphserve prepare: no room. Make some.", "some library: bye")
        assert world.idle.as_json()["state"] == "failed" and world.idle.error == "no room. Make some."
        (said,) = [line for line in world.logged() if line.startswith("WARNING")]
        assert "no room. Make some." in said and "bye" not in said
    gaps_h = [round((after - before) / 3600) for before, after in zip(waits, waits[1:], strict=False)]
    assert gaps_h == [1, 2, 4, 8, 16, 24, 24]


def test_a_child_that_was_killed_is_a_failure_with_its_signal(world: World) -> None:
    """Guards: memory ran out, and the log says nothing, or what the child happened to write last."""
    world.quiet(QUIET_S)
    world.ends(-9, "input scales: 3 of 30")
    assert "SIGKILL" in world.idle.error


def test_a_system_that_starts_no_process_is_a_failure(world: World) -> None:
    """Guards: an error in the API server's loop, which ends the watch for good."""
    world.refuses = "Cannot allocate memory"
    world.quiet(QUIET_S)
    assert world.idle.as_json()["state"] == "failed" and "Cannot allocate memory" in world.logged()[-1]
    world.refuses = ""
    world.quiet(QUIET_S)
    assert not world.children
    world.quiet(3600)
    assert world.idle.phase is Phase.RUNNING


def test_a_lock_that_another_has_is_no_failure(world: World) -> None:
    """Guards: a warning, an hour's wait, or a line every five minutes because another server of the host prepares."""
    for _ in range(4):
        world.quiet(QUIET_S)
        world.ends(TAKEN, "morphserve prepare: another server of this host has a model prepared.")
        assert world.idle.phase is Phase.IDLE
        world.quiet(QUIET_S - 1)
        world.now_s += 1
    assert len(world.children) == 4
    said = world.logged()
    assert sum("another server" in line for line in said) == 1 and not any("WARNING" in line for line in said)


@pytest.mark.parametrize("is_stopping", [False, True])
def test_the_child_ends_with_the_server(world: World, is_stopping: bool) -> None:
    """Guards: an orphan; a child that is started while the server ends."""
    world.quiet(QUIET_S)
    if is_stopping:
        world.request()
    world.idle.close()
    world.idle.close()
    assert world.children[0].was_waited_for
    world.quiet(10 * QUIET_S)
    assert len(world.children) == 1


def test_nothing_begins_once_the_server_ends(world: World) -> None:
    """Guards: a child that is started by the last tick of a server, and outlives it."""
    world.idle.close()
    world.quiet(QUIET_S)
    assert not world.children


def test_illegal_moves_are_refused() -> None:
    """Guards: a table that allows all."""
    with pytest.raises(IllegalTransition, match="DONE -> RUNNING"):
        Phase.DONE.to(Phase.RUNNING)


def test_settings_that_contradict_each_other_are_refused() -> None:
    """Guards: a server that prepares for hours what its own settings never look for; a typo that means never."""
    assert parse_config({}).prepare is None and parse_config({"prepare": "when_idle"}).prepare == "when_idle"
    with pytest.raises(ConfigError, match="`prepared: false` never looks for. Leave one of the two out"):
        parse_config({"prepare": "when_idle", "prepared": False})
    with pytest.raises(ConfigError, match="prepare: .*when_idle"):
        parse_config({"prepare": "idle"})


# -- the process


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def shell(tmp_path: Path) -> Callable[[str], tuple[Background, int]]:
    """Starts a script in the background, and waits for the pid that it writes into $FIFO."""

    def start(script: str) -> tuple[Background, int]:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        child = Background(["sh", "-c", script], {**os.environ, "FIFO": str(fifo)})
        return child, int(fifo.read_text())

    return start


def test_all_that_the_command_started_ends_with_it(shell: Callable[[str], tuple[Background, int]]) -> None:
    """Guards: the engine that the command started computes on beside the request that stopped it."""
    child, grandchild = shell("echo said; sleep 600 & echo $! > $FIFO; wait")
    assert child.poll() is None and is_alive(grandchild) and os.getpgid(grandchild) == child.pid
    assert child.said() == ["said"]
    child.end_now()
    assert child.poll() == -15 and not is_alive(grandchild)


def test_what_outlives_the_command_is_ended(shell: Callable[[str], tuple[Background, int]]) -> None:
    """Guards: the command is killed for memory, and the engine that it started stays."""
    child, grandchild = shell("sleep 600 & echo $! > $FIFO; kill -9 $$")
    while child.poll() is None:
        pass
    assert child.poll() == -9 and not is_alive(grandchild)


def test_what_does_not_listen_is_killed(
    shell: Callable[[str], tuple[Background, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a process that ignores SIGTERM, and a server that waits for it for ever."""
    monkeypatch.setattr(background, "_GRACE_S", 0.0)
    child, pid = shell("trap '' TERM; echo $$ > $FIFO; sleep 600; sleep 600")
    child.end_now()
    assert child.poll() == -9 and not is_alive(pid)


# What a server runs, as far as it concerns the end: a child that says when it is ready, and how it ends.
_SERVER = """
import os, subprocess, sys
child = "import signal; from morphserve.tools.prepare.beside_server import live_with, give_way; give_way()\\n"
child += "try:\\n live_with(%d)\\n import os\\n from pathlib import Path\\n" % os.getpid()
child += " print(os.sched_getscheduler(0) == os.SCHED_IDLE, os.nice(0))\\n"
child += " print(Path('/proc/self/oom_score_adj').read_text().strip())\\n"
child += " print('ready', flush=True); signal.pause()\\nexcept KeyboardInterrupt:\\n print('interrupted')"
subprocess.run([sys.executable, "-c", child])
"""


def test_the_child_gives_way_and_ends_with_a_server_that_is_killed() -> None:
    """Guards: a child that takes what requests need, or that lives on when its server is killed outright."""
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert [server.stdout.readline() for _ in range(3)] == ["True 19\n", "1000\n", "ready\n"]
    server.kill()
    assert server.stdout.read() == "interrupted\n"  # to its end, which comes when the child has ended
    server.wait()


def test_a_child_whose_server_is_gone_already_does_nothing() -> None:
    """Guards: a server that dies while its child starts, before that can be told of it."""
    script = "from morphserve.tools.prepare.beside_server import live_with; live_with(%d); print('goes on')"
    for server, said in ((os.getpid(), "goes on\n"), (os.getppid(), "")):
        done = subprocess.run([sys.executable, "-c", script % server], capture_output=True, text=True)
        assert done.stdout == said and bool(done.returncode) is not bool(said), done.stderr


def test_no_room_for_a_second_engine_is_said_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a host that runs out of memory because of what nobody has asked for."""
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 2**20)
    monkeypatch.setattr("kv_resize.available_bytes", lambda: 2**30)
    with pytest.raises(ProfilingError, match=r"takes up to 3\.0 GiB of memory, 1\.0 GiB are free\. Free some"):
        beside_server.check_memory(tmp_path, 1)
    monkeypatch.setattr("kv_resize.available_bytes", lambda: 2**32)
    beside_server.check_memory(tmp_path, 1)
    monkeypatch.setattr("kv_resize.available_bytes", lambda: None)
    beside_server.check_memory(tmp_path, 1)


def test_locks_are_held_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: two that go on with the same unfinished profile; two children on a host; a lock that stays."""
    monkeypatch.setattr(lock, "_HOST", f"\0test-{os.getpid()}")
    for take in (lambda: take_model(tmp_path), take_host):
        with take(), pytest.raises(TakenError, match="another"):
            take()
        take().close()


def test_a_lock_is_no_way_to_files_elsewhere(tmp_path: Path) -> None:
    """Guards: a link in a cache that several users write into, through which one makes another create files."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "lock").symlink_to(tmp_path / "made")
    with pytest.raises(OSError, match="symbolic links"):
        take_model(tmp_path / "cache")
    assert not (tmp_path / "made").exists()
