"""The wheel is the product: built, installed where vLLM is and the checkout is not, and used from another directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from morphserve.cpu_tier import best_dtype
from morphserve.tools.bench import ServerOptions, serve
from morphserve.version import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = ("morphserve", "policies", "quant_layers", "kv_resize")
OF_THE_PROJECT = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in", *PACKAGES)
CONSOLE_SCRIPT = """import sys
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""  # as pip writes it


@dataclass(frozen=True, slots=True)
class Installed:
    """An environment with the wheel, and where its user is."""

    wheel: Path
    sdist: Path
    bin: Path
    home: Path

    def run(self, program: str, *words: object) -> str:
        """What a command says on stdout."""
        done = subprocess.run(
            [str(self.bin / program), *map(str, words)], cwd=self.home, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{program} {words}: {done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def document(self, *words: object) -> dict[str, Any]:
        """The last line that `morphserve WORDS` says."""
        return dict(json.loads(self.run("morphserve", *words).splitlines()[-1]))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, made of what git knows of the packages, and the wheel that is made of the sdist alone."""
    work = tmp_path_factory.mktemp("build")
    source, dist = work / "source", work / "dist"
    for name in OF_THE_PROJECT:
        files = [ROOT / name] if (ROOT / name).is_file() else [f for f in (ROOT / name).rglob("*") if f.is_file()]
        for file in files:
            if "__pycache__" not in file.parts:
                copy = source / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    sdist = dist / make("build_sdist", source, dist)
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    return sdist, dist / make("build_wheel", work / sdist.name.removesuffix(".tar.gz"), dist)


def make(hook: str, source: Path, dist: Path) -> str:
    """Call the build backend as pip does, with what is installed; the file's name."""
    code = f"import sys; from setuptools import build_meta; name = build_meta.{hook}(sys.argv[1]); print(name)"
    done = subprocess.run([sys.executable, "-c", code, str(dist)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """A virtual environment that has vLLM by the packages of this one, and of ours the wheel alone."""
    sdist, wheel = built
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--quiet"]
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
    (site,) = (environment / "lib").glob("python3*/site-packages")
    # Lines of a .pth go on the path behind the environment's own; those of the directories named are not read, so that
    # the checkout's editable install is not found. There are two where another vLLM is laid over the environment.
    (site / "vllm.pth").write_text("\n".join(path for path in sys.path if Path(path).name == "site-packages") + "\n")
    # Nothing is left to fetch, or it fails; `cpu` and `cuda` ask for what the set-up may have had to remove.
    subprocess.run([*pip, "--dry-run", "morphserve[replay,tune,profile,ops]"], check=True)
    (environment / "bin" / "vllm").write_text(f"#!{python}\n{CONSOLE_SCRIPT}")
    (environment / "bin" / "vllm").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)  # in-process engines of other tests have set it
        yield Installed(wheel, sdist, environment / "bin", tmp_path_factory.mktemp("elsewhere"))


def test_what_is_built_is_whole(built: tuple[Path, Path]) -> None:
    """Guards: a window, a YAML, a source or a licence that only the checkout has; a page that does not render."""
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert str(file.relative_to(ROOT)) in inside
    info = f"morphserve-{__version__}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/morphserve/shipped/corpus/README.md"} <= inside
    assert all(f"{package}/py.typed" in inside for package in PACKAGES)
    with tarfile.open(sdist) as packed:
        assert f"morphserve-{__version__}/CHANGELOG.md" in packed.getnames()
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_only_the_wheel_is_imported(installed: Installed) -> None:
    """Guards: the tests below prove the checkout."""
    code = "import importlib, sys; print(*(importlib.import_module(name).__file__ for name in sys.argv[1:]), sep='\\n')"
    for file in installed.run("python", "-c", code, *PACKAGES).split():
        assert Path(file).is_relative_to(installed.bin.parent)
    version = installed.run("morphserve", "--version")
    assert version == f"morphserve {__version__}\n"


def test_three_commands_to_a_server_that_morphs(
    installed: Installed, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a file to edit or a step to know between `pip install` and the first server that changes its levels."""
    monkeypatch.setenv("MORPHSERVE_CACHE", str(demo_model.parents[1]))
    model = installed.run("morphserve", "demo", "--get-model").splitlines()[-1]
    monkeypatch.chdir(installed.home)
    options = ServerOptions(
        model=model, dtype=best_dtype(), enforce_eager=True, extra_args=("--plugin", "morphserve"),
        cpu_bind=os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "0"), command=(str(installed.bin / "vllm"), "serve"),
    )  # fmt: skip
    # The clients' room is left last: those that still wait for an answer end with the server.
    with ThreadPoolExecutor(40) as clients, serve(options, installed.home / "server.log") as server:
        answers = [clients.submit(ask, server.url) for _ in range(40)]
        status = json.loads(get(f"{server.url}/morphserve/status"))
        while status["level"] == 0 and not all(answer.done() for answer in answers):
            status = json.loads(get(f"{server.url}/morphserve/status"))
    assert status["level"] > 0 and status["failed"] == 0


def ask(url: str) -> bytes:
    """A request of ten blocks: 40 of them wait for minutes in the blocks that the server has at level 0."""
    body = {"model": "demo", "prompt": [100] * 60, "max_tokens": 260, "ignore_eos": True}
    return get(f"{url}/v1/completions", json.dumps(body).encode())


def get(url: str, body: bytes | None = None) -> bytes:
    with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=240) as answer:
        return bytes(answer.read())


def test_the_commands_work_from_elsewhere(installed: Installed, short_model: Path, demo_model: Path) -> None:
    """Guards: a command that needs a file of the checkout, or a package that no extra brings."""
    checked = json.loads(installed.run("morphserve", "check", "--json"))
    assert checked["ok"] is True
    assert "--morphserve-config mine.yaml" in installed.run("morphserve", "init", "mine.yaml")

    replayed = installed.document(
        "replay", "--workload", "convD", "--num-requests", "3", "--rate-scale", "20", "--compare", "morphserve",
        "--config", "mine.yaml", "--model", demo_model, "--enforce-eager", "--quiet", "--out", "replayed",
    )  # fmt: skip
    assert [(run["name"], run["sent"]) for run in replayed["runs"]] == [("morphserve", 3)]

    times = ROOT / "docs" / "results" / "step_times.json"  # a calibration that the user has made
    tuned = installed.document(
        "tune", "--config", "demo", "--step-times", times, "--dev", "convD", "--held-out", "hybA", "--trials", "4",
        "--jobs", "1", "--quiet", "--out", "tuned",
    )  # fmt: skip
    assert tuned["trials"]["total"] == 4 and "morphserve tune" in tuned["made"]["command"]

    made = installed.document(
        "profile", short_model, "--windows", "1", "--length", "64", "--draws", "1", "--no-measure", "--out", "profile"
    )
    assert installed.document("inspect", "profile", "--json")["ladder"] == made["ladder"]


def test_extras_have_what_the_commands_import() -> None:
    """Guards: a range of versions stated twice, one of them forgotten."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    ranges: dict[str, set[str]] = {}
    for requirement in (r for name in ("replay", "tune", "profile", "ops") for r in extras[name]):
        name, least = requirement.split(">=")
        ranges.setdefault(name, set()).add(least)
    assert [name for name, found in ranges.items() if len(found) > 1] == []
