"""Returning freed memory to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable


def _find_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library; its allocator decides by itself
        return None
    function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_int
    return function


_malloc_trim = _find_trim()


def trim() -> None:
    """Hand the heap's free pages back. glibc keeps them otherwise, and the KV cache could not have them."""
    if _malloc_trim is not None:
        _malloc_trim(0)
