"""Sorts every test into one class of hardware, and gives the demo model to those that need one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hardware import CLASSES, TESTS, UnclassifiedTest, hardware_class, missing_gpu
from hypothesis import settings

# A slow machine is no failure, and a red run must be red again when it is looked at.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("repeatable")

# The model is a local directory: nothing may look for it, or report, elsewhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Threads of an engine sleep while they wait: with two engines, or anything else, on the same cores, waiting in a loop
# takes ten times what is waited for. Read when torch is loaded; the number of threads, so the rounding, stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Test processes side by side (pytest -n): each computes on a core of its own.
if _worker := os.environ.get("PYTEST_XDIST_WORKER"):
    _cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(_cores[int(_worker.removeprefix("gw")) % len(_cores)]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# Files of minutes come first in their class, or one of them is the last and runs beside an idle process.
LONGEST = (
    "test_pipeline.py",
    "test_quantized_base.py",
    "test_ranks.py",
    "test_pipeline_sources.py",
    "test_profile.py",
    "test_reload.py",
    "test_requests.py",
    "test_replicas.py",
    "test_device.py",
    "test_identity.py",
    "test_import.py",
)


def _order(path: Path, of_class: str) -> tuple[int, int]:
    """Cheap classes first; the sort is stable, so files that are not named keep their order."""
    first = LONGEST.index(path.name) if of_class == "engine" and path.name in LONGEST else len(LONGEST)
    return CLASSES.index(of_class), first


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark, order and, without a device, skip. An unclassified file stops the run."""
    classes: dict[str, str] = {}  # item's node id -> class
    for item in items:
        try:
            classes[item.nodeid] = hardware_class(item.path)
        except UnclassifiedTest as e:
            raise pytest.UsageError(str(e)) from e
        item.add_marker(classes[item.nodeid])
    items.sort(key=lambda item: _order(item.path, classes[item.nodeid]))

    gpu_items = [item for item in items if classes[item.nodeid] == "gpu"]
    reason = missing_gpu() if gpu_items else None
    if reason is not None:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Directory of the demo model (SmolLM2-135M-Instruct, bf16, 30 Llama layers); made once, cached.

    MORPHSERVE_DEMO_MODEL names another directory.
    """
    given = os.environ.get("MORPHSERVE_DEMO_MODEL")
    if given:
        return Path(given)
    script = TESTS.parent / "scripts" / "demo_model.py"
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        pytest.fail("no demo model: scripts/demo_model.py says above what is missing", pytrace=False)
    return Path(done.stdout.strip().splitlines()[-1])
