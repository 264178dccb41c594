"""A library in front of libc that fails on demand: built by the C compiler that vLLM needs anyway."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from morphserve.errors import MorphServeError

# Only what gives whole regions back, and only while the file exists: the allocator's own small calls go through.
_SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
int madvise(void *start, size_t bytes, int advice) {
    static int (*real)(void *, size_t, int);
    if (!real) real = dlsym(RTLD_NEXT, "madvise");
    const char *path = getenv("MORPHSERVE_CHAOS_FAIL");
    if (advice == MADV_DONTNEED && bytes >= 16384 && path && access(path, F_OK) == 0) {
        errno = ENOMEM;
        return -1;
    }
    return real(start, bytes, advice);
}
"""


def failing_library(directory: Path) -> Path:
    """Build the library, and return its path.

    Raises:
        MorphServeError: there is no C compiler, or it refuses.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise MorphServeError("no C compiler (cc, gcc, clang) for the library that fails; install one")
    source, library = directory / "failing.c", directory / "failing.so"
    source.write_text(_SOURCE, encoding="utf-8")
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], capture_output=True, text=True
    )
    if done.returncode:
        raise MorphServeError(f"{compiler} does not build {source}: {done.stderr.strip()[-300:]}")
    return library
