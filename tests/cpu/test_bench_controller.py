"""The benchmark of the controller runs with the controller of today."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_goes_up_and_down() -> None:
    """Its executor has all that the controller reads; without that every transition fails."""
    command = [sys.executable, "scripts/bench_controller.py", "--steps", "3000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["steps"] == 3000 and document["transitions"] >= 2
