"""`prepare: when_idle`: a server that nobody has asked anything for some minutes lets a child prepare its model."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Protocol

from morphserve.backoff import BackOff
from morphserve.endings import how_it_ended, one_line
from morphserve.errors import next_state
from morphserve.prepared.lock import TAKEN

logger = logging.getLogger("vllm.morphserve")

QUIET_S = 300.0  # without a request, before it begins, and between two looks at what another process has taken
_RETRY_S, _RETRY_MAX_S = 3600.0, 86400.0  # after a failure; twice as long after each further one, up to a day
_PART = re.compile(r"[\w ]+(: \d+ of \d+| \.\.\.)")  # as `morphserve prepare` says how far it is
_ERROR = "morphserve prepare: "  # before what it fails with


class Child(Protocol):
    """What prepares. `Background` is one."""

    @property
    def pid(self) -> int:
        """Of its process."""
        ...

    def poll(self) -> int | None:
        """Return its exit status once all of it is gone."""
        ...

    def end(self) -> None:
        """Ask it to end, and see to it that it does."""
        ...

    def end_now(self) -> None:
        """End it, and wait until it is gone: at most some seconds."""
        ...

    def said(self) -> list[str]:
        """Return the last lines that it has written."""
        ...


class Phase(Enum):
    """Where a server is with what it prepares.

    ::

                 quiet                     it has ended well
        IDLE --------------> RUNNING ----------------------------> DONE
         | ^  ^               |  |  |                               ^
         | |  '---- taken ----'  |  '- a request --> STOPPING ------'
         | |                     |                       |
         | '---------------------+----- it is gone ------'
         |                       |
         '-- cannot start --> FAILED <--.
                                 |  '---'
                                 '-- quiet, and the wait is over --> RUNNING

    IDLE: waits for quiet. STOPPING: the child was told to end, and has not yet. FAILED: waits, longer each time. DONE:
    nothing is missing any more.
    """

    IDLE = "idle"
    RUNNING = "running"
    STOPPING = "stopping"
    FAILED = "failed"
    DONE = "done"

    def to(self, new: Phase) -> Phase:
        """Return `new`, if the table has the move.

        Raises:
            IllegalTransition: it has not.
        """
        return next_state("prepare", _NEXT, self, new)


_NEXT: Mapping[Phase, frozenset[Phase]] = {
    Phase.IDLE: frozenset({Phase.RUNNING, Phase.FAILED}),
    Phase.RUNNING: frozenset({Phase.STOPPING, Phase.FAILED, Phase.DONE, Phase.IDLE}),
    Phase.STOPPING: frozenset({Phase.IDLE, Phase.DONE}),
    Phase.FAILED: frozenset({Phase.RUNNING, Phase.FAILED}),
    Phase.DONE: frozenset(),
}


class WhenIdle:
    """Begins when it has been quiet, stops at the next request, goes on in the next quiet.

    1. There is at most one child, and none begins before the last one is gone.
    2. From the tick that sees a request on, the child ends; nothing waits for it.
    3. No child begins sooner after a failure than `_RETRY_S`, twice as long after each further one.
    4. After `close` there is no child, and none begins.
    """

    def __init__(self, start: Callable[[], Child], model: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Wait for quiet.

        Args:
            start: starts a child, or raises OSError.
            model: for the log.
            clock: seconds.
        """
        self._start = start
        self._model = model
        self._clock = clock
        self._child: Child | None = None
        self._last_request_s = clock()
        self._backoff = BackOff(_RETRY_S, _RETRY_MAX_S)
        self._is_closed = self._said_taken = False
        self.phase = Phase.IDLE
        self.error = ""

    def tick(self, is_busy: bool) -> None:
        """Look at the child and at the traffic, and do what follows. Cheap, and waits for nothing.

        Args:
            is_busy: somebody is served, or has been since the last tick, or nobody knows.
        """
        now = self._clock()
        if is_busy:
            self._last_request_s = now
        if self._child is None:
            if self._may_begin(now):
                self._begin()
        elif (code := self._child.poll()) is not None:
            self._ended(code, self._child.said())
        elif is_busy and self.phase is Phase.RUNNING:
            logger.info(
                "morphserve: a request has come: preparing stops (%s); it goes on after %.0f min without any.",
                self._part() or "it had just begun", QUIET_S / 60,
            )  # fmt: skip
            self.phase = self.phase.to(Phase.STOPPING)
            self._child.end()

    def close(self) -> None:
        """End the child with the server: bounded, see `Background`. Re-entrant."""
        self._is_closed = True
        child, self._child = self._child, None
        if child is not None:
            logger.info("morphserve: the server ends, and preparing with it; what was finished is kept.")
            child.end_now()

    def as_json(self) -> dict[str, Any]:
        """Return plain values for the status."""
        next_s = max(self._backoff.not_before_s, self._last_request_s + QUIET_S) - self._clock()
        waits = self.phase in (Phase.IDLE, Phase.FAILED)
        return {
            "state": self.phase.value,
            "part": self._part(),
            "note": self.error,
            "begins_in_s": round(max(next_s, 0.0), 1) if waits else None,
        }

    def _may_begin(self, now: float) -> bool:
        is_due = now >= max(self._last_request_s + QUIET_S, self._backoff.not_before_s)
        return is_due and not self._is_closed and self.phase in (Phase.IDLE, Phase.FAILED)

    def _begin(self) -> None:
        try:
            self._child = self._start()
        except OSError as e:
            self._failed(str(e))
            return
        self.phase, self.error = self.phase.to(Phase.RUNNING), ""
        logger.info(
            "morphserve: no request for %.0f min: process %d prepares %s, at the lowest priority; a request stops it.",
            QUIET_S / 60, self._child.pid, self._model,
        )  # fmt: skip

    def _ended(self, code: int, said: list[str]) -> None:
        self._child = None
        if code == 0:
            self.phase = self.phase.to(Phase.DONE)
            kept = next((line for line in said if line.startswith("profile ")), "what was missing")
            logger.info("morphserve: prepared %s: stored %s. The next start uses it.", self._model, kept)
        elif self.phase is Phase.STOPPING:
            self.phase = self.phase.to(Phase.IDLE)
        elif code == TAKEN:
            self.phase = self.phase.to(Phase.IDLE)
            self._backoff.hold(self._clock() + QUIET_S)
            if not self._said_taken:
                logger.info("morphserve: not prepared as yet: %s", _cause(said))
            self._said_taken = True
        else:
            self._failed(_cause(said) if said and code > 0 else f"{how_it_ended(code, 'the process')}.")

    def _failed(self, why: str) -> None:
        self.phase, self.error = self.phase.to(Phase.FAILED), one_line(why)
        wait_s = self._backoff.failed(self._clock())
        logger.warning(
            "morphserve: could not prepare %s while idle: %s The next try is in %.0f min at the earliest; `morphserve "
            "prepare` by hand may do it before.",
            self._model, self.error, wait_s / 60,
        )  # fmt: skip

    def _part(self) -> str:
        """Return what the child is at, as 'input scales: 3 of 30'."""
        said = [] if self._child is None else self._child.said()
        return next((line for line in reversed(said) if _PART.fullmatch(line)), "")


def _cause(said: list[str]) -> str:
    """Return what the command ended with; below it there may be what libraries say at their end."""
    own = [line.removeprefix(_ERROR) for line in said if line.startswith(_ERROR)]
    return one_line((own or said or ["it has not said why."])[-1])
