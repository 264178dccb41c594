"""How the cause of an end travels from the process that met it to the last line of the one that the user started."""

from __future__ import annotations

import inspect
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm.v1.engine.core as core
import vllm.v1.executor.multiproc_executor as executor
from vllm.v1.engine.utils import CoreEngineProcManager

from morphserve.endings import PREFIX
from morphserve.errors import ConfigError, EngineEndedError
from morphserve.integration import ending

MEMORY = "Available memory on node 0 (15.56/17.09 GiB) on startup is less"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An armed server's file."""
    found = tmp_path / "ending"
    found.touch()
    monkeypatch.setenv(ending._FILE, str(found))
    return found


def run_engine_core(error: BaseException) -> None:
    """As vLLM's function of that name does."""
    try:
        raise error
    except BaseException:
        logging.getLogger("vllm.v1.engine.core").exception("EngineCore failed to start.")


def some_step(error: BaseException) -> None:
    try:
        raise error
    except BaseException:
        logging.getLogger("vllm.v1.engine.core").exception("Invocation of a method failed")


def test_vllm_logs_the_end_of_its_processes_where_we_listen() -> None:
    """Guards: vLLM says elsewhere why a process ends, and no server of ours says why any more."""
    for function in (executor.WorkerProc.worker_main, core.EngineCoreProc.run_engine_core):
        assert "logger.exception(" in inspect.getsource(function) and function.__name__ in ending._FATAL_FUNCTIONS
    monitor = inspect.getsource(executor.MultiprocExecutor.start_worker_monitor)
    assert "def monitor_workers" in monitor and "died unexpectedly (exit code: %s)" in monitor


def test_only_what_ends_a_process_is_written_down(file: Path) -> None:
    """Guards: an error that a server survived is named hours later as what ended it."""
    ending.listen()
    some_step(ValueError("survived"))
    assert ending.cause() is None
    run_engine_core(ValueError(MEMORY))
    run_engine_core(RuntimeError("Engine core initialization failed. See root cause above."))
    assert ending.cause() == f"ValueError: {MEMORY}"
    run_engine_core(ConfigError("lower it"))
    assert ending.cause() == "lower it"


def test_nothing_is_written_through_a_link(file: Path, tmp_path: Path) -> None:
    """Guards: a file of the server's user, into which another one of the machine has its end written."""
    (mine := tmp_path / "mine").write_text("mine")
    file.unlink()
    file.symlink_to(mine)
    ending.note("it ended")
    assert mine.read_text() == "mine" and ending.cause() is None


def test_unarmed_process_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an engine without MorphServe raises other errors than vLLM's own."""
    monkeypatch.delenv(ending._FILE, raising=False)

    def fail() -> None:
        raise KeyError("theirs")

    ending.note("nowhere")
    with pytest.raises(KeyError):
        ending._with_cause(fail)()


def test_error_of_a_waiting_process_says_the_cause(file: Path) -> None:
    """Guards: `LLM(...)` raises that a background process failed, and where to look instead of why."""

    def fail() -> None:
        raise RuntimeError("WorkerProc initialization failed. See stack trace for root cause.")

    with pytest.raises(RuntimeError, match="See stack trace"):  # nothing is known
        ending._with_cause(fail)()
    ending.note(ValueError(MEMORY))
    with pytest.raises(EngineEndedError, match=r"Available memory.*Set VLLM_CPU_KVCACHE_SPACE=1"):
        ending._with_cause(fail)()
    file.unlink()
    with pytest.raises(RuntimeError, match="See stack trace"):  # a cleaned /tmp
        ending._with_cause(fail)()


@pytest.mark.parametrize(
    ("code", "asked", "said"),
    [(-9, False, "EngineCore was killed (SIGKILL)"), (-9, True, None), (0, False, None), (-15, False, None)],
)
def test_a_killed_engine_core_is_told_of(
    file: Path, monkeypatch: pytest.MonkeyPatch, code: int, asked: bool, said: str | None
) -> None:
    """Guards: an engine core that the system has killed, which leaves no word, ends the server without one; an end that
    somebody asked for, or at which vLLM has killed what was left, told as a failure."""
    manager = object.__new__(CoreEngineProcManager)
    manager.processes = [SimpleNamespace(name="EngineCore", sentinel=1, exitcode=code)]  # type: ignore[list-item]
    manager.manager_stopped, manager.failed_proc_name = threading.Event(), None
    monkeypatch.setattr("vllm.v1.engine.utils.connection.wait", lambda *_, **__: [1])
    monkeypatch.setattr(manager, "shutdown", lambda: None)
    if asked:
        manager.manager_stopped.set()
    ending._with_killed_core(CoreEngineProcManager.monitor_engine_liveness)(manager)
    found = ending.cause()
    assert found is None if said is None else said in (found or "")


class Speechless(Exception):
    def __str__(self) -> str:
        raise KeyError("words")


def test_an_error_without_words_is_noted_by_its_kind(file: Path) -> None:
    """Guards: in place of an error, the one of putting it into words."""
    ending.note(Speechless())
    assert ending.cause() == f"{__name__}.Speechless"

    def fail() -> None:
        raise Speechless

    with pytest.raises(EngineEndedError, match="Speechless"):
        ending._with_cause(fail)()
    record = logging.LogRecord("vllm", logging.ERROR, "core.py", 1, "%d", ("x",), None, "run_engine_core")
    ending._RECORDER.emit(record)


def test_a_record_that_was_cut_off_is_skipped(file: Path) -> None:
    """Guards: a writer that was killed, or a full disk, hides the error that is being handled and the next cause."""
    file.write_bytes(b'\n["ValueError", "cut \xc3')
    assert ending.cause() is None
    for other in ('"x"', "3", '["a"]', "[1, 2]", "null"):
        with file.open("a") as stream:
            stream.write(f"\n{other}")
    with file.open("a") as stream:
        stream.write("\n[")
    ending.note(ValueError(MEMORY))
    assert ending.cause() == f"ValueError: {MEMORY}"


def test_each_record_is_one_write(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: halves of two processes' records mixed."""
    written: list[bytes] = []
    monkeypatch.setattr(os, "write", lambda _, data: written.append(data))
    ending.note("x" * 100_000)
    (record,) = written
    assert json.loads(record) == ["", "x" * 100_000]


# Imports what all programs below need, once. For each {"source", "cwd", "env"} on standard input a fork then runs the
# source as its own program, to its end; a line with its status and what it said follows.
STARTER = """
import json, os, sys, tempfile
from morphserve.errors import ConfigError
from morphserve.integration import ending, seams
import uvloop
import vllm.v1.engine.utils as utils
from vllm.entrypoints.launchers.api_server import entry
from vllm.v1.engine.exceptions import EngineDeadError
for line in sys.stdin:
    program = json.loads(line)
    said = tempfile.TemporaryFile()
    if (pid := os.fork()) == 0:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        os.chdir(program["cwd"])
        os.environ.clear()
        os.environ.update(program["env"])
        tempfile.tempdir = None
        exec(compile(program["source"], "program", "exec"))
        break
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said.seek(0)
    print(json.dumps([code, said.read().decode()]), flush=True)
"""


@dataclass(frozen=True)
class Done:
    returncode: int
    stderr: str  # and what it wrote to standard output


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run a program whose temporary files belong into a directory; vLLM is imported once for all of them."""
    command = [sys.executable, "-c", STARTER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdin and starter.stdout
        to, answers = starter.stdin, starter.stdout
        inherited = {name: value for name, value in os.environ.items() if name != ending._FILE}

        def run_program(source: str, temporary: Path, cwd: Path | None = None) -> Done:
            env = {**inherited, "TMPDIR": str(temporary)}
            to.write(json.dumps({"source": source, "cwd": str(cwd or Path.cwd()), "env": env}) + "\n")
            to.flush()
            return Done(*json.loads(answers.readline()))

        yield run_program
        to.close()


COMMAND = """
import atexit
atexit.register(os.write, 2, b"leaks")
ending.arm(is_cli={cli})
ending.arm(is_cli={cli})
file = os.environ[ending._FILE]
sys.stderr.write(file + chr(10))
if {fails}:
    ending.note(ConfigError("w9 has no kernel here. Leave it out."))
{call}
"""


WRAPPED = """
try:
    utils.wait_for_engine_startup()
except RuntimeError as e:
    raise OSError("no model") from e
"""
CAUGHT = """
try:
    utils.wait_for_engine_startup()
except RuntimeError:
    pass
"""


SERVED = """
import asyncio
async def closed():
    sys.stderr.write("closed" + chr(10))
async def until_the_end(app, port):
    return closed()
patch = next(patch for patch in seams.patches() if patch.row is seams.SERVE_HTTP)
patch.undo()
entry.serve_http = until_the_end
ending.arm(is_cli=True)
if {fails}:
    ending.note(ConfigError("w9 has no kernel here. Leave it out."))
async def run_server_worker():
    shutdown_task = await entry.serve_http("app", port=1)
    try:
        await shutdown_task
    finally:
        sys.stderr.write("socket" + chr(10))
uvloop.run(run_server_worker())
"""


@pytest.mark.parametrize("fails", [True, False])
def test_a_server_whose_engine_has_died_does_not_end_well(fails: bool, run: Run, tmp_path: Path) -> None:
    """Guards: status 0, which a supervisor that restarts on failure takes for a wish; status 1 of a server that was
    asked to end; one that ends before all is closed, or that says nothing of why."""
    call = SERVED.format(fails=fails)
    done = run(COMMAND.format(cli=True, call=call, fails=False), tmp_path)
    said = done.stderr.splitlines()
    assert said[-3:-1] == ["closed", "socket"] and done.returncode == int(fails), done.stderr
    assert said[-1] == (f"{PREFIX}w9 has no kernel here. Leave it out." if fails else "leaks")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("cli", "call", "code", "last"),
    [
        (True, "utils.wait_for_engine_startup()", 1, f"{PREFIX}w9 has no kernel here. Leave it out."),
        (True, "pass", 0, f"{PREFIX}w9 has no kernel here. Leave it out."),  # the engine died while it served
        (False, "utils.wait_for_engine_startup()", 1, "morphserve.errors.EngineEndedError: w9 has no kernel here. "
         "Leave it out."),
        (False, "raise EngineDeadError", 1, f"{PREFIX}w9 has no kernel here. Leave it out."),
        (False, WRAPPED, 1, f"{PREFIX}w9 has no kernel here. Leave it out."),
        (False, "raise ConfigError('w9 has no kernel here. Leave it out.')", 1, "morphserve.errors.ConfigError: w9"),
        (False, f"{CAUGHT}\nraise ValueError('a bug')", 1, "ValueError: a bug"),  # of its own, later
    ],
)  # fmt: skip
def test_the_cause_is_the_last_line(
    cli: bool, call: str, code: int, last: str, run: Run, tmp_path: Path
) -> None:
    """Guards: `vllm serve` ends with a stack, a script's error does not say why, or files stay in /tmp."""
    done = run(COMMAND.format(cli=cli, call=call, fails=True), tmp_path)
    lines = done.stderr.splitlines()
    if not cli:
        assert lines.pop() == "leaks", "what a script says at its end is the user's"
    assert done.returncode == code and lines[-1].startswith(last), done.stderr
    assert not (cli and "Traceback" in done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_script_that_survived_says_nothing_but_its_own(run: Run, tmp_path: Path) -> None:
    """Guards: an error that a script caught said at its end; the user's own leaks hidden."""
    call = f"{CAUGHT}\nassert not sys.warnoptions"
    done = run(COMMAND.format(cli=False, call=call, fails=True), tmp_path)
    assert done.returncode == 0 and list(tmp_path.iterdir()) == []
    assert "w9" not in done.stderr and done.stderr.endswith("leaks")


UNARMED = """
os.environ[ending._FILE] = "of another"
def refuse(**_):
    raise FileNotFoundError("No usable temporary directory")
real, tempfile.mkstemp = tempfile.mkstemp, refuse
ending.arm(is_cli=True)
ending.note("nowhere")
assert ending.cause() is None and ending._FILE not in os.environ
tempfile.mkstemp = real
ending.arm(is_cli=True)
os.unlink(os.environ[ending._FILE])
os.rmdir(os.environ["TMPDIR"])
ending.arm(is_cli=True)
assert ending._FILE not in os.environ
"""


def test_a_start_needs_no_temporary_file(run: Run, tmp_path: Path) -> None:
    """Guards: a server that does not start because TMPDIR cannot be written, or writes to another server's file."""
    own = tmp_path / "own"
    own.mkdir()
    done = run(UNARMED, own, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_good_end_has_no_last_line(run: Run, tmp_path: Path) -> None:
    """Guards: every server that is stopped says that it failed."""
    done = run(COMMAND.format(cli=True, call="pass", fails=False), tmp_path)
    assert done.returncode == 0 and list(tmp_path.iterdir()) == []
    assert PREFIX not in done.stderr and "leaks" in done.stderr


def test_what_ended_is_read_by_its_user_alone(file: Path) -> None:
    """Guards: a message with a path or a prompt in it, among temporary files where every user of the machine looks."""
    file.unlink()
    before = os.umask(0)
    try:
        ending.note("it ended")
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o600
