"""Processes that end with whoever started them, also where that one is killed outright."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from functools import partial

_PR_SET_PDEATHSIG = 1  # prctl(2)
_PRCTL = ctypes.CDLL(None).prctl  # looked up here, and not between fork and exec


def end_with(parent: int) -> None:
    """Have this process sent SIGTERM when the thread that started it ends; leave at once where it is another's child.

    Args:
        parent: process id of who started it.
    """
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before this could be asked for
        os._exit(1)


def with_us() -> Callable[[], None]:
    """Return the `preexec_fn` of a child that ends when this process does, to be started in the main thread.

    It hears SIGTERM, whether this process ignores it or not.
    """
    return partial(_begin, os.getpid())


def _begin(parent: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what is ignored stays so beyond exec
    end_with(parent)
