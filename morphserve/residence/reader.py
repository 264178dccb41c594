"""Reads of files beside the forward passes: the cache may lie on a disk that is slow, or away."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from queue import SimpleQueue
from traceback import clear_frames
from typing import Any

_Jobs = SimpleQueue[Callable[[], None] | None]  # None: there will be no more


class Reader(Executor):
    """Runs what it is given on one thread, in order, from the first job on.

    A thread that a hung read holds cannot be ended, and nobody waits for it: neither a step nor, as for the threads of
    `ThreadPoolExecutor`, the end of the process. What was cancelled meanwhile is not read any more.
    """

    def __init__(self) -> None:
        self._jobs: _Jobs = SimpleQueue()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._jobs.put, None)

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return at once. A result lives as long as its future."""
        done: Future[Any] = Future()

        def job() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(work(*args, **kwargs))
            except BaseException as e:
                clear_frames(e.__traceback__)  # what was read before it failed goes at once
                done.set_exception(e)

        if self._thread is None:
            self._thread = threading.Thread(target=_run, args=(self._jobs,), name="morphserve-reader", daemon=True)
            self._thread.start()
        self._jobs.put(job)
        return done


def _run(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # and what it has read: the next one may be long in coming


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a rank waits for a read.

    Attributes:
        pause_s: within a command, while its steps stand still: what lies in memory is there by then, in one command.
        timeout_s: in all, while steps go on; then the read is given up.
        clock: monotonic seconds.
    """

    pause_s: float = 0.03
    timeout_s: float = 15.0
    clock: Callable[[], float] = time.monotonic
