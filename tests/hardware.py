"""Which hardware a test needs, told by the directory it lies in."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

TESTS = Path(__file__).resolve().parent

# In the order they run: what fails fast and cheaply comes first.
CLASSES = ("cpu", "seams", "engine", "gpu")


class UnclassifiedTest(Exception):
    """A test file lies outside the directories of the classes."""


def hardware_class(file: Path) -> str:
    """Class of a test file.

    Raises:
        UnclassifiedTest: the file lies in none of the class directories.
    """
    relative = file.relative_to(TESTS) if file.is_relative_to(TESTS) else file
    if len(relative.parts) < 2 or relative.parts[0] not in CLASSES:
        raise UnclassifiedTest(
            f"{relative}: a test file lies in one of {', '.join('tests/' + c for c in CLASSES)}. "
            "Move it to the cheapest one that can run it."
        )
    return relative.parts[0]


def missing_gpu() -> str | None:
    """Why tests of class gpu cannot run here, or None. Does not load CUDA into this process."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "no NVIDIA device: nvidia-smi is not installed"
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    if listed.returncode != 0 or "GPU" not in listed.stdout:
        return f"no NVIDIA device: nvidia-smi -L says {(listed.stdout + listed.stderr).strip()[:100]!r}"
    return None
