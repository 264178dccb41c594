"""The device path on a real engine, with fake pages in place of a GPU's. What is tested stands in device_run.py.

In a process of their own: vLLM extends its worker class for good, and a process that has served one kind of worker
cannot serve the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from engine.rank_harness import CORES

CASES = Path(__file__).with_name("device_run.py")
ROOT = CASES.parents[2]
NUM_CASES = 5 if len(CORES) > 1 else 4  # one has two ranks


def test_on_fake_pages(demo_model: Path) -> None:
    """Guards what the cases say; and cases that are never run."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["MORPHSERVE_DEMO_MODEL"] = str(demo_model)
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=540)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"{NUM_CASES} passed" in done.stdout, done.stdout[-2000:]
