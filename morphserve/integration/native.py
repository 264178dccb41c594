"""Builds csrc/opaque_linear.cpp once and loads it.

torch.compile needs a C++ compiler on CPU too, so where this matters one is there. Without one, or when the
build fails, the Python op of the same name serves: slower by 2 to 3 ms a step, never wrong.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger("vllm.morphserve")

SOURCE = Path(__file__).with_name("csrc") / "opaque_linear.cpp"
_BUILD_TIMEOUT_S = 300


def load(cache_dir: Path) -> bool:
    """Make `torch.ops.morphserve.linear` native. False (and one warning) when that cannot be done here."""
    try:
        torch.ops.load_library(_library(cache_dir))
    except Exception as e:  # no compiler, no space, a broken toolchain: each leaves the Python op
        logger.warning("morphserve: no native linear (%s); compiled steps cost 2-3 ms more", e)
        return False
    return True


def _library(cache_dir: Path) -> Path:
    """Path of the shared object for this source and this torch, built if it is not there."""
    source = SOURCE.read_bytes()
    key = hashlib.sha256(source + torch.__version__.encode()).hexdigest()[:16]
    library = cache_dir / "native" / f"opaque_linear-{key}.so"
    if not library.exists():
        _build(library)
    return library


def _build(library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: install g++, or set CXX")
    library.parent.mkdir(parents=True, exist_ok=True)
    # Ranks may build at the same time: each into its own file, the last rename wins.
    handle, name = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    command = [
        compiler, "-O2", "-std=c++20", "-fPIC", "-shared", str(SOURCE), "-o", name,
        *(f"-isystem{path}" for path in include_paths()),
        *(f"-L{path}" for path in library_paths()),
        "-lc10", "-ltorch_cpu", "-ltorch",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{compiler} failed: {done.stderr.strip().splitlines()[-1:]}")
        os.replace(name, library)
    finally:
        Path(name).unlink(missing_ok=True)
    logger.info("morphserve: built %s", library.name)
