"""SIGHUP, which a closed terminal sends to every process of a server: all ignore it but those that reload at it.

A process hands the signals that it ignores down to those that it starts, from their first moment on. So the front
process alone has to ignore it, for engine cores and workers, vLLM's coordinator, Python's resource tracker, compilers.
"""

from __future__ import annotations

import os
import signal
import threading

_IGNORED_BY = "MORPHSERVE_HANGUP_IGNORED_BY"  # the front process, for its children; no option for users


def ignore_hangups() -> None:
    """Ignore SIGHUP from here on, in this process of a server and in all that it starts. Re-entrant.

    Where somebody has taken it, as nohup has, it stays his.
    """
    if threading.current_thread() is not threading.main_thread():  # no other may
        return
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.environ[_IGNORED_BY] = str(os.getpid())


def hangup_is_free() -> bool:
    """Return whether SIGHUP may get a handler of ours here: nobody has taken it but `ignore_hangups`."""
    handler = signal.getsignal(signal.SIGHUP)
    # One of several API servers: the process above them is the front.
    ours = os.environ.get(_IGNORED_BY) in (str(os.getpid()), str(os.getppid()))
    return handler is signal.SIG_DFL or (handler is signal.SIG_IGN and ours)
