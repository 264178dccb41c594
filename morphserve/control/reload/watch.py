"""The thread that looks at the settings' file once in a while, and when somebody asks it to."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from queue import Empty, Queue
from typing import Any

from morphserve.control.reload.file import LOOK_INTERVAL_S
from morphserve.control.reload.reloader import Outcome, PolicyReloader, Reloads

logger = logging.getLogger(__name__)


class ReloadWatch:
    """The thread that looks once in a while, and when it is asked to.

    All reloads of an engine are its work, one at a time: by the file, and by `ask`, for a signal or a request.
    """

    def __init__(self, reloader: PolicyReloader, interval_s: float = LOOK_INTERVAL_S) -> None:
        self._reloader = reloader
        self._interval_s = interval_s
        self._asked: Queue[tuple[str, str, bool, Future[dict[str, Any]]] | None] = Queue()
        self._last: Future[dict[str, Any]] | None = None  # that was asked for
        self._is_closed = self._has_thread = self._has_failed = False
        if reloader.has_file:
            self._start()

    @property
    def reloads(self) -> Reloads:
        """The reloads so far."""
        return self._reloader.reloads

    def ask(self, cause: str, sent: str = "", is_rehearsal: bool = False) -> Future[dict[str, Any]]:
        """Have the file read now, or what was sent (see `PolicyReloader.reload`); the thread completes the future.

        One at a time: whoever asks meanwhile is told that it is busy. One thread asks.
        """
        future: Future[dict[str, Any]] = Future()
        outcome: Outcome = "refused"
        why = "the engine is shutting down" if self._is_closed else ""
        if not (why or sent or self._reloader.has_file):
            why = (
                "the settings came without a file (additional_config, or no --morphserve-config): there is none to "
                "read. POST /morphserve/reload with a `policy:` section in the body, JSON or YAML"
            )
        if not why and self._last is not None and not self._last.done():
            outcome, why = "busy", "another reload is under way. Ask again when it has answered."
        if why:
            future.set_result({**self._reloader.answer(), "ok": False, "outcome": outcome, "error": why})
        else:
            self._last = future
            self._start()
            self._asked.put((cause, sent, is_rehearsal, future))
        return future

    def close(self) -> None:
        """Stop: no look comes after the one that may be under way. Re-entrant."""
        self._is_closed = True
        self._asked.put(None)

    def _start(self) -> None:
        """Start the thread: at once where there is a file, else when somebody sends a policy first."""
        if not self._has_thread:
            self._has_thread = True
            threading.Thread(target=self._loop, name="morphserve-reload", daemon=True).start()

    def _loop(self) -> None:
        while not self._is_closed:
            try:
                asked = self._asked.get(timeout=self._interval_s if self._reloader.has_file else None)
            except Empty:
                asked = None
            if asked is None:
                self._look()
                continue
            cause, sent, is_rehearsal, future = asked
            future.set_result(self._reloader.reload(cause, sent, is_rehearsal))

    def _look(self) -> None:
        if self._is_closed or not self._reloader.has_file:
            return
        try:
            self._reloader.look()
        except Exception:
            if not self._has_failed:  # whatever it is may be there at every look
                logger.exception("morph: looking for a new policy failed, the policy stays")
            self._has_failed = True
