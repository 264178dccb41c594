"""What `morphserve check` promises, an engine keeps; and what it refuses, an engine refuses.

On the tier that this process runs on: with MORPHSERVE_CPU_TIER it is another one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine import check_run
from engine.rank_harness import make_model

from morphserve import cpu_tier
from morphserve.control import DEFAULT_FORMATS

pytestmark = pytest.mark.cpu_tier

DTYPES = ("bfloat16", "float16", "float32")


def last_line(*command: str) -> Any:
    """Of a Python process that ended well, or said by its status that the answer is no."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (0, 1) and done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{\n") :] if "--json" in command else done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def checked() -> dict[str, Any]:
    """The document of a process of its own."""
    document: dict[str, Any] = last_line("-m", "morphserve", "check", "--json")
    return document


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights."""
    return make_model(tmp_path_factory.mktemp("tiny"), num_layers=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_check_and_engine_agree(dtype: str, checked: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """Guards: `can run here`, and then a server that does not start, serves other formats, or does not come back to
    level 0; a refusal of what would have run."""
    said = checked["dtypes"][dtype]
    found = last_line(check_run.__file__, str(tiny_model), str(tmp_path), dtype)
    assert found["started"] == said["ok"], (said["problem"], found)
    if found["started"]:
        promised = {fmt: said["formats"][fmt]["kernel"] for fmt in DEFAULT_FORMATS if said["formats"][fmt]["kernel"]}
        assert found["kernels"] == promised and set(found["formats"]) == {"base", *promised}
        assert found["restored"] and not found["errors"]

def test_the_dtype_that_serves_best_can_be_served(checked: dict[str, Any]) -> None:
    """Guards: a tier on which `make demo` has no kernel for the dtype it takes."""
    assert checked["best_dtype"] == checked["dtype"] == cpu_tier.best_dtype()
    assert checked["ok"], checked["problems"]
