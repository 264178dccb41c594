"""The seam check that reads sources agrees with the one that imports, on small packages that both can take."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import check_seams
import pytest

from morphserve.errors import SeamError
from morphserve.integration.seams import check as seams
from morphserve.integration.seams import source as seam_source
from morphserve.integration.seams.check import SeamResult
from morphserve.integration.seams.rows import Seam
from morphserve.integration.seams.tree import SourceTree

ROOT = Path(__file__).parents[2]
_NUMBERS = itertools.count()
FILES = {
    "__init__.py": """
import typing

if typing.TYPE_CHECKING:
    from .engine import Engine
else:
    def __getattr__(name):
        import importlib

        if name == "Engine":
            return importlib.import_module(__name__ + ".engine").Engine
        raise AttributeError(name)
""",
    "base.py": """
import functools

def keep(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper

def plan(config, memory):
    return memory

class Base:
    def __init__(self):
        self.inherited = 1

    @keep
    def run(self, step, *, quick=False):
        return step
""",
    "engine.py": """
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, NamedTuple

from .base import Base as Parent

class Kind(Enum):
    SMALL = 1

class Times(NamedTuple):
    first: float

@dataclass
class Config:
    size: int = 0
    late: int = field(default=0, init=False)
    kind: ClassVar[str] = "x"

class Engine(Parent):
    table: dict

    def __init__(self, config, *, limit=1, **rest):
        super().__init__()
        self.config, self.limit = config, limit
        if limit > 1:
            self.path = "a"
        else:
            self.path = "b"
        self.extra = limit
        self.bare: int

        def inner():
            self.nested = 1

    @property
    def load(self):
        return 0

    @classmethod
    def make(cls, config):
        return cls(config)

    def start(self, when):
        self.started = when

class Deep(Engine):
    pass
""",
    "planning.py": """
from typing import TYPE_CHECKING

from .base import plan
from .base import plan as other_name
from . import engine
again = plan
declared: int

def local(a):
    return a

if TYPE_CHECKING:
    from .base import Base
else:
    def at_run_time(a):
        return a
""",
    "inner/__init__.py": """
from ..base import plan as from_above
from .part import *
""",
    "inner/part.py": """
from ..engine import Engine

def by_star(x):
    return x

def _not_by_star(x):
    return x
""",
    "platform.py": """
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    current: "Platform"

class Platform:
    def is_gpu(self, index):
        return False

class Cpu(Platform):
    pass

def __getattr__(name):
    if name == "current":
        return Cpu()
    raise AttributeError(name)
""",
}


class World:
    """A package on disk that can be damaged, read and imported."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        (root / name).mkdir()
        for file, text in FILES.items():
            (root / name / file).parent.mkdir(exist_ok=True)
            (root / name / file).write_text(text, encoding="utf-8")

    def damage(self, file: str, old: str, new: str) -> None:
        path = self.root / self.name / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, old
        path.write_text(text.replace(old, new), encoding="utf-8")

    def seam(self, target: str, params: tuple[str, ...] = (), attributes: tuple[str, ...] = ()) -> Seam:
        return Seam("row", f"{self.name}{target}", params, "test", attributes)

    def check(self, seam: Seam) -> SeamResult:
        """By source; the check that imports must have said the same."""
        read = seam_source.check_seam(seam, SourceTree(self.root, self.name))
        imported = seams.check_seam(seam)
        assert (read.ok, imported.ok) in ((True, True), (False, False)), (read.detail, imported.detail)
        return read


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, f"seamworld{next(_NUMBERS)}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield made
    for module in [name for name in sys.modules if name.partition(".")[0] == made.name]:
        del sys.modules[module]


HOLD = [
    (":Engine", ("config", "limit", "rest"), ("config", "limit", "path", "table", "load", "inherited", "run", "start")),
    (".engine:Deep", ("limit",), ("inherited", "extra")),
    (".engine:Deep.run", ("self", "step", "quick"), ()),
    (".engine:Engine.make", ("config",), ()),
    (".engine:Engine.start", ("when",), ("started",)),
    (".engine:Kind.SMALL", (), ()),
    (".engine:Times", ("first",), ("first",)),
    (".engine:Config", ("size",), ("size", "late", "kind")),
    (".planning:plan", ("config", "memory"), ()),
    (".planning:other_name", ("memory",), ()),
    (".planning:again", ("memory",), ()),
    (".planning:engine.Engine.run", ("step",), ()),
    (".planning:at_run_time", ("a",), ()),
    (".platform:current.is_gpu", ("index",), ()),
    (".inner:from_above", ("memory",), ()),
    (".inner:by_star", ("x",), ()),
    (".inner.part:Engine.make", ("config",), ()),
]


@pytest.mark.parametrize(("target", "params", "attributes"), HOLD, ids=[row[0] for row in HOLD])
def test_what_is_there_holds(
    world: World, target: str, params: tuple[str, ...], attributes: tuple[str, ...]
) -> None:
    """Guards: a vLLM that would do is refused, because a re-export, a base class or a decorator was not followed."""
    assert world.check(world.seam(target, params, attributes)).ok


DAMAGE = {
    "renamed parameter": (("base.py", "plan(config, memory)", "plan(config, budget, memory2=1)"),
                          (".planning:again", ("memory",), ()), "parameters ['memory'] are gone"),
    "moved function": (("base.py", "def plan(", "def plan_moved("), (".planning:plan", (), ()), "has no plan"),
    "moved module": (("planning.py", "from .base import plan\n", "from .gone import plan\n"),
                     (".planning:plan", (), ()), "has no plan"),
    "not at run time": (("planning.py", "from .base import plan\n", "if TYPE_CHECKING:\n    from .base import plan\n"),
                        (".planning:plan", (), ()), "has no plan"),
    "removed attribute": (("engine.py", "self.config, self.limit = config, limit", "self.config, _ = config, limit"),
                          (":Engine", (), ("config", "limit")), "instances have no ['limit']"),
    "removed in a base": (("base.py", "self.inherited = 1", "pass"),
                          (".engine:Deep", (), ("inherited",)), "instances have no ['inherited']"),
    "other base": (("engine.py", "class Engine(Parent):", "class Engine(dict):"),
                   (".engine:Deep", (), ("inherited",)), "not read: ['dict']"),
    "set by an inner function": (("engine.py",
                                  "        self.extra = limit\n        self.bare: int\n\n        def inner():\n",
                                  "        def inner():\n            self.extra = limit\n"),
                                 (":Engine", (), ("extra",)), "instances have no ['extra']"),
    "removed annotation": (("engine.py", "    table: dict\n", ""), (":Engine", (), ("table",)), "no ['table']"),
    "removed method": (("engine.py", "def load(", "def loads("), (":Engine", (), ("load",)), "no ['load']"),
    "stored elsewhere": (("engine.py", "self.started = when", "self.begun = when"),
                         (".engine:Engine.start", ("when",), ("started",)), "no ['started']"),
    "no longer a parameter": (("engine.py", "size: int = 0", "size: int = field(default=0, init=False)"),
                              (".engine:Config", ("size",), ()), "parameters ['size'] are gone; it has []"),
    "removed member": (("engine.py", "SMALL = 1", "LARGE = 1"), (".engine:Kind.SMALL", (), ()), "has no SMALL"),
    "removed from a type": (("platform.py", "def is_gpu(", "def is_cuda("), (".platform:current.is_gpu", (), ()),
                            "current of"),
    "deleted": (("planning.py", "def local(a):\n    return a", "del again"), (".planning:local", (), ()), "no local"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(world: World, name: str) -> None:
    """Guards: a row holds whatever vLLM has become, and the server breaks in its first burst on the device."""
    damage, (target, params, attributes), detail = DAMAGE[name]
    world.damage(*damage)
    result = world.check(world.seam(target, params, attributes))
    assert not result.ok and detail in result.detail, result.detail


NEVER = [
    (".engine:Config", ("late",), ()),  # a field that is no argument
    (".engine:Config", ("kind",), ()),  # a class variable
    (".engine:Engine.make", ("cls",), ()),  # bound already
    (".platform:current.is_gpu", ("self",), ()),  # bound already
    (":Engine", (), ("bare",)),  # annotated in a constructor, never stored
    (":Engine", (), ("nested",)),  # stored by a function inside of the constructor
    (":Engine.load", ("self",), ()),  # a property
    (".planning:declared", (), ()),  # annotated in a module, never bound
    (".planning:Base", (), ()),  # for the type checker only
    (".inner:_not_by_star", (), ()),
    (".planning:plan", (), ("result",)),  # a function that stores nothing
]


@pytest.mark.parametrize(("target", "params", "attributes"), NEVER)
def test_what_only_looks_like_it_does_not_hold(
    world: World, target: str, params: tuple[str, ...], attributes: tuple[str, ...]
) -> None:
    """Guards: names that the sources mention, and no call or instance has, count as there."""
    assert not world.check(world.seam(target, params, attributes)).ok


@pytest.mark.parametrize(
    ("old", "new", "noted"),
    [
        ("        self.extra = limit\n", "        if limit:\n            self.extra = limit\n", True),
        ("        self.extra = limit\n", "        for _ in config:\n            self.extra = limit\n", True),
        ("        if limit > 1:\n", "        if limit > 2:\n            return\n        if limit > 1:\n", True),
        ("        self.extra = limit\n", "        try:\n            self.extra = 1\n        except OSError:\n"
         "            pass\n", True),
        ("        self.extra = limit\n", "        if not limit:\n            raise ValueError\n        else:\n"
         "            self.extra = limit\n", False),
        ("        self.extra = limit\n", "        with config:\n            self.extra = limit\n", False),
    ],
)  # fmt: skip
def test_an_attribute_of_some_paths_only_is_noted(world: World, old: str, new: str, noted: bool) -> None:
    """Guards: an attribute moves into a branch, the row holds as before, and nobody is told to look."""
    plain = world.check(world.seam(":Engine", (), ("extra", "path")))
    assert plain.ok and plain.detail == "present"
    world.damage("engine.py", old, new)
    result = seam_source.check_seam(world.seam(":Engine", (), ("extra",)), SourceTree(world.root, world.name))
    assert result.ok and ("only on some paths: ['extra']" in result.detail) == noted, result.detail


def test_a_wheel_says_what_its_directory_says(world: World, tmp_path: Path) -> None:
    """Guards: relative imports and packages are found on disk only, and every row of a wheel fails."""
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in FILES:
            archive.write(tmp_path / world.name / file, f"{world.name}/{file}")
    rows = [world.seam(*row) for row in HOLD]
    packed = seam_source.check_sources(rows, SourceTree(wheel, world.name))
    assert packed == seam_source.check_sources(rows, SourceTree(tmp_path, world.name)) and all(r.ok for r in packed)


def test_what_is_no_vllm_is_refused(tmp_path: Path) -> None:
    """Guards: a mistyped path reads as a vLLM of which no row holds."""
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "nothing.whl"):
        with pytest.raises(SeamError, match="holds no vllm/__init__.py"):
            SourceTree(path)


def stub(root: Path, version: str) -> Path:
    (root / "vllm").mkdir()
    (root / "vllm" / "__init__.py").write_text("")
    (root / "vllm" / "_version.py").write_text(f"__version__: str\n__version__ = version = {version!r}\n")
    return root


@pytest.mark.parametrize(
    ("version", "ok"), [("0.32.1", True), ("0.33.0+cu130", True), ("0.31.0", False), ("0.34.0rc1", False)]
)
def test_the_version_is_read(tmp_path: Path, version: str, ok: bool) -> None:
    """Guards: rows of a vLLM outside of the supported range pass for a promise."""
    result = seam_source.check_sources_version(SourceTree(stub(tmp_path, version)))
    assert result.ok == ok and version in result.detail


def test_the_script_loads_no_vllm(tmp_path: Path) -> None:
    """Guards: the wheel of another platform is imported, and fails; a stranger's wheel is run."""
    stub(tmp_path, "0.32.0")
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('imported')")
    command = [sys.executable, check_seams.__file__, "--wheel", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": ":".join(sys.path)})
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1 and not found["ok"] and found["vllm"] == "0.32.0", done.stderr
    assert [row["name"] for row in found["seams"] if row["holds"]] == ["version"]
    assert found["num_rows"] == len(found["seams"]) == 1 + sum(map(len, check_seams.TABLES.values()))


def test_each_supported_version_that_is_here_has_all_rows() -> None:
    """Guards: a row, or a parameter in it, that one of two supported versions does not have."""
    sites = [file.parents[1] for file in sorted(ROOT.glob(".venv-*/lib/python3.*/site-packages/vllm/__init__.py"))]
    trees = [tree for tree in map(SourceTree, sites) if seam_source.check_sources_version(tree).ok]
    if not trees:
        pytest.skip("no environment with another vLLM is here: make setup VLLM=0.33.0")
    for tree in trees:
        results = [r for rows in check_seams.TABLES.values() for r in seam_source.check_sources(rows, tree)]
        broken = [(r.seam.name, r.detail) for r in results if not r.ok]
        assert broken == [], seam_source.sources_version(tree)


def test_a_new_parameter_without_a_default_is_noted(world: World) -> None:
    """Guards: all names are as before, and the call that we pass on lacks one that the next version wants."""
    row = world.seam(".planning:plan", ("config", "memory"))
    assert world.check(row).detail == "present, parameters match"
    world.damage("base.py", "plan(config, memory)", "plan(config, memory, groups, limit=None, *, kind, late=0)")
    result = seam_source.check_seam(row, SourceTree(world.root, world.name))
    assert result.ok and result.detail == "present, parameters match, also needs ['groups', 'kind']"
