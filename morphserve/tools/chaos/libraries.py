"""A library in front of libc that fails on demand: built by the C compiler that vLLM needs anyway.

What it does says a file that is there while it does so (`Stage.broken`): a word, and a number where one is meant.

    no-release     madvise(MADV_DONTNEED) of whole regions is refused: KV blocks that are given back
    no-populate    madvise(MADV_POPULATE_WRITE) is refused: memory for more KV blocks
    no-mmap        mmap of anonymous memory by name is refused: layers that are read in
    no-write       write to a file below the cache's directory meets a full disk
    slow-read N    read of a packed file takes N milliseconds more
    hang-read      read of a packed file does not come back before the word is gone
    stop-read, stop-unmap, stop-map
                   who first reads a packed file, releases or populates removes the file and stops itself (SIGSTOP)
    clock N        the time of day is N seconds more. What waits in the kernel for a time of day is not moved

Who is refused, slowed down or held leaves a file of the same name with `.met` behind it.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from morphserve.errors import MorphServeError

SAYS, CACHE = "MORPHSERVE_CHAOS_SAYS", "MORPHSERVE_CHAOS_CACHE"  # in the environment: that file, and the directory


def failing_library(directory: Path) -> Path:
    """Build the library, and return its path.

    Raises:
        MorphServeError: there is no C compiler, or it refuses.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise MorphServeError("no C compiler (cc, gcc, clang) for the library that fails; install one")
    source, library = Path(__file__).with_name("failing.c"), directory / "failing.so"
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", str(library), str(source), "-ldl"],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise MorphServeError(f"{compiler} does not build {source}: {done.stderr.strip()[-300:]}")
    return library
