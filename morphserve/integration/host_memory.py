"""glibc's allocator, told to give freed weights back to the system at once.

Blocks above M_MMAP_THRESHOLD are mapped on their own and unmapped when freed. glibc raises that threshold
to the size of what was freed last, so that after the first swap weights would come from the heap and stay
there until malloc_trim, which takes 5-46 ms here: too long between two steps. Weights are therefore built
with a low threshold, and activations with the value glibc itself ends up at (32 MiB, its maximum), so that
the serving path allocates as it does without us.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
from collections.abc import Iterator

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_WEIGHTS_THRESHOLD = 64 * 1024
_SERVING_THRESHOLD = 32 * 1024 * 1024


def _mallopt() -> object | None:
    name = ctypes.util.find_library("c")
    if name is None:
        return None
    return getattr(ctypes.CDLL(name), "mallopt", None)  # musl has none


_MALLOPT = _mallopt()


def _glibc_allocates() -> bool:
    """False when another allocator is preloaded: it serves malloc, and mallopt means nothing to it."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        loaded = maps.read()
    return not any(other in loaded for other in ("tcmalloc", "jemalloc", "mimalloc"))


# Dropping a weight built inside `weights_on_their_own_pages` unmaps it: no malloc_trim is needed.
FREED_WEIGHTS_RETURN = _MALLOPT is not None and _glibc_allocates()


@contextlib.contextmanager
def weights_on_their_own_pages() -> Iterator[None]:
    """Allocate large blocks inside the `with` such that freeing them returns their memory.

    Does nothing where the allocator is not glibc's (musl, or tcmalloc/jemalloc preloaded): freed weights
    then return when that allocator decides so.
    """
    if _MALLOPT is None:
        yield
        return
    _MALLOPT(_M_MMAP_THRESHOLD, _WEIGHTS_THRESHOLD)  # type: ignore[operator]
    try:
        yield
    finally:
        _MALLOPT(_M_MMAP_THRESHOLD, _SERVING_THRESHOLD)  # type: ignore[operator]
        _MALLOPT(_M_TRIM_THRESHOLD, 2 * _SERVING_THRESHOLD)  # type: ignore[operator]


def resident_bytes() -> dict[str, int]:
    """Resident memory of this process in bytes: anonymous, file-backed and shared (/proc/self/status)."""
    wanted = {"RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared"}
    found = dict.fromkeys(wanted.values(), 0)
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            key, _, rest = line.partition(":")
            if key in wanted:
                found[wanted[key]] = int(rest.split()[0]) * 1024
    return found
