"""glibc's allocator, told to give freed weights back to the system at once.

Blocks above M_MMAP_THRESHOLD are mapped on their own and unmapped when freed. glibc raises that threshold
to the size of what was freed last, so that after the first swap weights would come from the heap and stay
there until malloc_trim, which takes 5-46 ms here: too long between two steps. Weights are therefore built
with a low threshold, and activations with the value glibc itself ends up at (32 MiB, its maximum), so that
the serving path allocates as it does without us.

The threshold alone is not enough: glibc looks at it only when no free chunk of the heap is large enough, and
loading a model leaves hundreds of those. Weights built in them stayed resident after they were freed (72 MB
beyond the budget on a 135M model), so while weights are built the holes are taken.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
from collections.abc import Callable, Iterator

from quant_layers import trim

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_WEIGHTS_THRESHOLD = 64 * 1024
_SERVING_THRESHOLD = 32 * 1024 * 1024


_LARGEST_HOLE = 1 << 30
_IS_MMAPPED = 2  # bit of the size word in front of a chunk (glibc, malloc/malloc.c)


def _libc() -> ctypes.CDLL | None:
    """Return glibc, None for any other C library."""
    name = ctypes.util.find_library("c")
    libc = None if name is None else ctypes.CDLL(name)
    if libc is None or not hasattr(libc, "mallopt"):  # musl has none
        return None
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc


_LIBC = _libc()


def _glibc_allocates() -> bool:
    """Return False when another allocator is preloaded: it serves malloc, and mallopt means nothing to it."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        loaded = maps.read()
    return not any(other in loaded for other in ("tcmalloc", "jemalloc", "mimalloc"))


# Dropping a weight built inside `weights_on_their_own_pages` unmaps it: no malloc_trim is needed.
FREED_WEIGHTS_RETURN = _LIBC is not None and _glibc_allocates()


def _take_holes(libc: ctypes.CDLL) -> list[int]:
    """Allocate every free chunk of the heap that a weight could be put into; untouched, so at no cost.

    Returns:
        Addresses to free.
    """
    taken = []
    size = _LARGEST_HOLE
    while size >= _WEIGHTS_THRESHOLD:
        address = libc.malloc(size)
        if address and not ctypes.c_size_t.from_address(address - 8).value & _IS_MMAPPED:
            taken.append(address)
            continue
        libc.free(address)
        size //= 2
    return taken


@contextlib.contextmanager
def weights_on_their_own_pages() -> Iterator[None]:
    """Allocate large blocks inside the `with` such that freeing them returns their memory.

    Does nothing where the allocator is not glibc's (musl, or tcmalloc/jemalloc preloaded): freed weights
    then return when that allocator decides so.
    """
    if _LIBC is None or not FREED_WEIGHTS_RETURN:
        yield
        return
    _LIBC.mallopt(_M_MMAP_THRESHOLD, _WEIGHTS_THRESHOLD)
    holes = _take_holes(_LIBC)
    try:
        yield
    finally:
        _LIBC.mallopt(_M_MMAP_THRESHOLD, _SERVING_THRESHOLD)
        _LIBC.mallopt(_M_TRIM_THRESHOLD, 2 * _SERVING_THRESHOLD)
        for address in holes:
            _LIBC.free(address)


def peak_beyond_now(action: Callable[[], object]) -> int:
    """Bytes by which this process grows at most while `action` runs.

    Where the kernel does not let the high-water mark be reset, an earlier peak may count too: then it is a bound.
    """
    trim()  # free pages of the heap would hide what the action needs
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # proc(5): resets VmHWM
    before = _status_bytes("VmRSS")
    action()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


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
