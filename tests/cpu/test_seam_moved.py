"""What has moved between two versions of a package, as the report for a new vLLM says it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import check_seams
import pytest

from morphserve.integration.seams import Seam, SourceTree, compare

BEFORE = '''
"""A module."""
LIMIT = 3

def plan(config, memory=1, *, strict=False):
    """Plan it."""
    total = memory * 2
    return total

class Base:
    def __init__(self, limit):
        self.limit = limit  # of blocks

    def run(self, step):
        return step

class Engine(Base):
    """Runs."""

    def start(self):
        return self.limit
'''


def move(tmp_path: Path, old: str, new: str, target: str, attributes: tuple[str, ...] = ()) -> tuple[str, str]:
    """(kind, detail) of one row, after `old` in the sources has become `new`."""
    assert old in BEFORE
    trees = []
    for name, text in (("before", BEFORE), ("after", BEFORE.replace(old, new))):
        (tmp_path / name / "vllm").mkdir(parents=True)
        (tmp_path / name / "vllm" / "__init__.py").write_text("")
        (tmp_path / name / "vllm" / "core.py").write_text(text)
        trees.append(SourceTree(tmp_path / name))
    (found,) = compare([Seam("row", f"vllm.core:{target}", (), "test", attributes)], *trees)
    assert (found.diff == "") == (found.kind == "same")
    return found.kind, found.detail


MOVED = [
    ("memory * 2", "memory * 3", "plan", (), "body", "plan: +1 -1 lines"),
    ("strict=False", "strict=True", "plan", (), "signature", "plan: -strict = False, +strict = True"),
    ("memory=1", "memory=1, groups=None", "plan", (), "signature", "plan: +groups = None"),
    ("(config, memory=1, *,", "(memory=1, config=0, *,", "plan", (), "signature", "plan: -config, +config = 0"),
    ("def plan(", "def plan_all(", "plan", (), "gone", "plan: gone"),
    ("return step", "return step + 1", "Engine.run", (), "body", "Engine.run: +1 -1 lines"),
    ("self.limit = limit", "self.limit = 2 * limit", "Engine", ("limit", "run"), "body", "limit: +1 -1 lines"),
    ("self.limit = limit", "self.most = limit", "Engine", ("limit", "run"), "gone", "limit: gone"),
    ("def start(self)", "def start(self, when)", "Engine", ("start",), "signature", "start: +when"),
    ("    def start(self):\n        return self.limit\n", "    pass\n", "Engine", (), "body", "Engine: +0 -1 lines"),
    ("LIMIT = 3", "LIMIT = 4", "LIMIT", (), "body", "LIMIT: +1 -1 lines"),
]


@pytest.mark.parametrize(("old", "new", "target", "attributes", "kind", "detail"), MOVED)
def test_what_has_moved_is_named(
    tmp_path: Path, old: str, new: str, target: str, attributes: tuple[str, ...], kind: str, detail: str
) -> None:
    """Guards: a new version passes for the old one where a row holds in both and means something else."""
    assert move(tmp_path, old, new, target, attributes) == (kind, detail)


@pytest.mark.parametrize(
    ("old", "new", "target", "attributes"),
    [
        ('"""Plan it."""', '"""Plan all of it."""', "plan", ()),  # a docstring
        ("self.limit = limit  # of blocks", "self.limit  =  limit", "Engine", ("limit",)),  # a comment, the layout
        ("return step", "return step + 1", "Engine", ("start", "limit")),  # what the row does not speak of
        ("return self.limit", "return 7", "Engine", ()),  # a body that other rows speak of
    ],
)
def test_what_does_not_count_is_not_named(
    tmp_path: Path, old: str, new: str, target: str, attributes: tuple[str, ...]
) -> None:
    """Guards: a report in which what matters drowns."""
    assert move(tmp_path, old, new, target, attributes) == ("same", "")


def test_the_report_says_what_is_gone(tmp_path: Path) -> None:
    """Guards: a report that fails where a row's target is gone, or whose status says that all is well."""
    for version, body in (("1.0", "def wait_for_engine_startup(name): ..."), ("1.1", "")):
        package = tmp_path / version / "vllm"
        engine = package / "v1" / "engine"
        engine.mkdir(parents=True)
        for folder in (package, package / "v1", engine):
            (folder / "__init__.py").write_text("")
        (package / "_version.py").write_text(f"__version__ = version = {version!r}\n")
        (engine / "utils.py").write_text(body)
    both = [str(tmp_path / version) for version in ("1.0", "1.1")]
    command = [sys.executable, check_seams.__file__, "--compare", *both, "--diff"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1 and (found["before"], found["after"]) == ("1.0", "1.1"), done.stderr
    assert [row["name"] for row in found["moved"]] == ["engine_start"] and found["num_rows"]["gone"] == 1
    assert "\n-...\n" in done.stdout


def test_a_version_is_a_wheel_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: 0.3 GB downloaded for each question; a path that looks like a version, looked for on the index."""
    monkeypatch.setattr(check_seams, "WHEELS", tmp_path)
    wheel = tmp_path / "vllm-9.9.9-cp38-abi3-any.whl"
    wheel.touch()
    assert check_seams.locate("9.9.9") == wheel
    assert check_seams.locate(str(wheel)) == wheel and check_seams.locate("wheels/vllm-0.1.0.whl").suffix == ".whl"
