"""The newest status of each engine, how old it is, and what holds while they are silent.

An engine answers between two of its steps. One that hangs answers never, and takes what it is asked into its queue: so
who looks at it is shown the last answer, and while it owes one nobody asks again but the poll, at its own slow pace.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

logger = logging.getLogger("vllm.morphserve")

POLL_INTERVAL_S = 0.5
ANSWER_TIMEOUT_S = 3.0  # of an answer to somebody who must know what is so now, as who orders something
SILENT_AFTER_S = 30.0  # one step of long prompts takes seconds on a CPU; from here on last figures are none
_NO_ANSWER = "no answer"
_UNKNOWN = "unknown"  # which engines there are, until they have answered

Status = dict[str, Any]


class StatusPoll:
    """Asks the engines twice a second.

    Promises:
        1. Figures that are older than `SILENT_AFTER_S` are no figures: `statuses` is empty until the engines answer.
        2. However many look, engines are asked twice a second; one that is silent for `ANSWER_TIMEOUT_S` gets one
           question more in `SILENT_AFTER_S`.
        3. One WARNING a silence, however long, and one INFO line when it ends.
    """

    def __init__(self, ask: Callable[[], Awaitable[list[Status]]], clock: Callable[[], float] = time.monotonic) -> None:
        """Ask nothing yet.

        Args:
            ask: returns the status of every engine behind this API server.
            clock: monotonic seconds.
        """
        self._ask = ask
        self._clock = clock
        self.last: list[Status] = []  # however old
        self._heard_s = clock()  # when the question was put that `last` answers: the figures are no older
        self._runs = False
        self._asked_s: float | None = None  # when the poll has put the question that has no answer yet
        self._failed = False  # the poll's last question got none
        self._told = False  # of it

    @property
    def statuses(self) -> list[Status]:
        """The last figures, if they are still worth something."""
        return [] if self._failed or self.age_s > SILENT_AFTER_S else self.last

    @property
    def ages_s(self) -> dict[str, float]:
        """Of each engine how old its last figures are; before the first answer, for how long there has been none."""
        if self._runs and not self.last:
            return {_UNKNOWN: self.age_s}
        return {str(status["engine"]): self.age_s for status in self.last}

    @property
    def age_s(self) -> float:
        """How old the last figures are at most; before the first answer, since when the poll runs."""
        return max(self._clock() - self._heard_s, 0.0)

    async def look(self) -> list[Status]:
        """Ask now, for somebody who must know what is so.

        Raises:
            TimeoutError: the engines do not answer in time, or owe an answer and are not asked.
        """
        if self._is_owed or not await self._heard(ANSWER_TIMEOUT_S):
            raise TimeoutError
        return self.last

    async def run(self, tell: Callable[[list[Status]], None]) -> None:
        """Poll until cancelled.

        Args:
            tell: gets the statuses after each question, none while the engines are silent.
        """
        self._runs = True
        if not self.last:
            self._heard_s = self._clock()
        while True:
            self._asked_s = self._clock()
            problem = await self._ask_patiently()
            self._asked_s = None
            try:
                tell([] if problem else self.last)
            except Exception as e:
                problem = problem or f"{type(e).__name__}: {e}"
            self._note(problem)
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _ask_patiently(self) -> str:
        """Ask, and return why there is no answer; '' = there is one."""
        try:
            return "" if await self._heard(SILENT_AFTER_S) else f"{_NO_ANSWER} for {SILENT_AFTER_S:.0f} s"
        except Exception as e:  # the engine may be starting, stopping or dead
            return f"{type(e).__name__}: {e}"

    @property
    def _is_owed(self) -> bool:
        """Whether the engines have kept the poll waiting, so that another question would only lengthen their queue."""
        return self._failed or (self._asked_s is not None and self._clock() - self._asked_s > ANSWER_TIMEOUT_S)

    async def _heard(self, timeout_s: float) -> bool:
        """Ask, and return whether all engines have answered in time."""
        asked_s = self._clock()
        try:
            async with asyncio.timeout(timeout_s):  # `wait_for` of Python 3.11 may swallow the cancellation at the end
                self.last = await self._ask()
        except TimeoutError:
            return False
        self._heard_s = asked_s
        return True

    def _note(self, problem: str) -> None:
        """Tell of a silence. One error is none yet: of a server that is told to stop the engine ends first."""
        if problem and not self._told and (self._failed or problem.startswith(_NO_ANSWER)):
            self._told = True
            logger.warning(
                "morphserve: no status from the engine (%s); until it answers its metrics are their age alone, and a "
                "policy's queue limit does not hold",
                problem,
            )
        if self._told and not problem:
            self._told = False
            logger.info("morphserve: the engine answers again")
        self._failed = bool(problem)
