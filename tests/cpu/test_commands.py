"""`morphserve` and its commands: what one row of the table promises, and what scripts/ adds to it."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import bench_engine
import pytest

from morphserve.commands import dispatch, main
from morphserve.commands.table import COMMANDS, Command
from morphserve.tools import command as ends

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
BY_NAME = {command.name: command for command in COMMANDS}
# scripts that are commands of their own, for who works on the project
OWN = (
    "bench_controller", "bench_flood", "bench_idle", "bench_kernels", "bench_kv", "bench_profile", "bench_swap",
    "check_monitoring", "check_seams", "compare_orders", "compare_policies", "draw_rooms", "early_late", "live_tasks",
    "readme_figures", "results", "second_model",
)  # fmt: skip
# script |-> the command that it is a door of
DOORS = {
    "calibrate": "calibrate", "demo_model": "demo", "gpu_check": "gpu-check", "measure_kl": "measure-kl",
    "profile_layers": "profile", "quantize": "quantize", "replay": "replay", "soak": "soak", "sweep": "sweep",
    "tune": "tune",
}  # fmt: skip


def doc_of(command: Command) -> str:
    """The docstring of a command's module."""
    return str(importlib.import_module(f"morphserve.{command.module}").__doc__).strip()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_is_the_docstring_with_an_example(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a command that is run once in a year, and ends in a traceback before it has read its options."""
    with pytest.raises(SystemExit) as ended:
        main([command.name, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and doc_of(command) in shown
    assert shown.startswith(f"usage: morphserve {command.name} ")
    assert re.search(rf"^    .*morphserve {command.name}\b", doc_of(command), re.MULTILINE), "no example"


@pytest.mark.parametrize("name", DOORS)
def test_a_script_is_a_door_of_its_command(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a script that people call by its path does something else than the command, or ends in a traceback."""
    script = ROOT / "scripts" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0 and doc_of(BY_NAME[DOORS[name]]) in capsys.readouterr().out


@pytest.mark.parametrize("name", OWN)
def test_help_of_a_script_is_its_docstring(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: the same, of what the package does not need."""
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    assert ended.value.code == 0 and str(script.__doc__).strip() in capsys.readouterr().out


def test_the_list_of_commands_loads_none_of_them() -> None:
    """Guards: seconds until a user sees what there is, or a traceback because torch is not there."""
    heavy = "{'torch', 'vllm', 'matplotlib', 'numpy', 'pydantic', 'yaml', 'aiohttp', 'rich'}"
    code = (
        "import sys\nfrom morphserve.commands import main\ntry: main(['--help'])\n"
        f"except SystemExit: print(sorted({heavy} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["[]"]
    for command in COMMANDS:
        assert re.search(rf"^  {command.name} +{re.escape(command.help)}$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(("words", "said"), [([], "COMMAND"), (["servve"], "'servve'"), (["--dtype"], "COMMAND")])
def test_wrong_usage_is_status_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a typo that a script takes for success, or for a failed run."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def module_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Command:
    """A command of which nothing but this is known."""
    (tmp_path / "stand_in_command.py").write_text(f"def main(argv, prog):\n    {code}\n", encoding="utf-8")
    monkeypatch.setattr("morphserve.__path__", [*sys.modules["morphserve"].__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "morphserve.stand_in_command", raising=False)
    return Command("mine", "stand_in_command", "", "tune")


@pytest.mark.parametrize(
    ("package", "remedy"),
    [
        ("optuna", 'optuna is not installed. Install what this command needs: pip install "morphserve[tune]"'),
        ("vllm", 'vllm is not installed. Install what this command needs: pip install "morphserve[cpu]", or '
         '"morphserve[cuda]" where an NVIDIA GPU is'),
    ],
)  # fmt: skip
def test_what_is_not_installed_has_the_name_of_its_extra(
    package: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a traceback, or advice that installs something else."""
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    command = module_that(tmp_path, monkeypatch, f"import {package}.part")
    assert dispatch.run(command, []) == 1
    assert capsys.readouterr().err == f"morphserve mine: {remedy}\n"


def test_a_mistake_of_ours_is_no_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a module that we forgot to move, which the user is told to install."""
    command = module_that(tmp_path, monkeypatch, "import morphserve.nowhere")
    with pytest.raises(ModuleNotFoundError):
        dispatch.run(command, [])


def test_ctrl_c_is_status_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a traceback for who has seen enough, or an interrupted command that a script takes for done."""
    assert dispatch.run(module_that(tmp_path, monkeypatch, "raise KeyboardInterrupt"), []) == 130
    assert capsys.readouterr().err == "morphserve mine: interrupted\n"


def test_sigterm_is_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: `kill PID` of a command that leaves behind what it has started; an error in a thread."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    command = module_that(tmp_path, monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    try:
        assert dispatch.run(command, []) == 130
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert capsys.readouterr().err == "morphserve mine: interrupted\n"


def test_a_command_runs_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a handler of a signal, which no other thread than the main one may set."""
    command, found = module_that(tmp_path, monkeypatch, "return 7"), list[int]()
    thread = threading.Thread(target=lambda: found.append(dispatch.run(command, [])))
    thread.start()
    thread.join()
    assert found == [7]


def test_every_extra_of_a_row_can_be_installed() -> None:
    """Guards: a remedy that pip does not know."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {command.extra for command in COMMANDS} - {""} <= extras.keys()


def test_the_last_line_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: figures that only people can read, or a failure that looks like a success."""
    assert ends.finish({"step_ms_p50": bench_engine.ms([0.003, 0.001, 0.002])}) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"step_ms_p50": 2.0}
    assert ends.fail("soak", "level 0 is not reached") == 1
    assert capsys.readouterr().err == "soak: level 0 is not reached\n"
