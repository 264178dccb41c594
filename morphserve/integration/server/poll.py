"""The newest status of each engine, how old it is, and what holds while they are silent.

An engine answers between two of its steps. One that hangs answers never, and takes what it is asked into its queue: so
who asks waits a bounded time, and while it owes an answer nobody asks again but the poll, at its own slow pace.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import HTTPException

logger = logging.getLogger("vllm.morphserve")

POLL_INTERVAL_S = 0.5
ANSWER_TIMEOUT_S = 3.0  # then who asks gets the last figures and their age; `morphserve watch` waits 5 s for both
SILENT_AFTER_S = 30.0  # one step of long prompts takes seconds on a CPU; from here on last figures are none

Status = dict[str, Any]


class StatusPoll:
    """Asks the engines twice a second.

    Promises:
        1. Figures that are older than `SILENT_AFTER_S` are no figures: `statuses` is empty until the engines answer.
        2. However many ask, an engine that is silent for `ANSWER_TIMEOUT_S` gets one question more in `SILENT_AFTER_S`.
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
        self._last: list[Status] | None = None
        self._heard_s = 0.0
        self._asked_s: float | None = None  # when the poll has put the question that has no answer yet
        self._failed = False  # the poll's last question got none

    @property
    def statuses(self) -> list[Status]:
        """The last figures, if they are still worth something."""
        is_old = self._failed or self._age_s > SILENT_AFTER_S
        return [] if is_old or self._last is None else self._last

    @property
    def ages_s(self) -> dict[int, float]:
        """Of each engine that has ever answered, how old its last figures are."""
        return {status["engine"]: self._age_s for status in self._last or ()}

    async def latest(self) -> list[Status]:
        """Return each engine's status with its `age_s`: of now, or the last one where there is no answer in time.

        Raises:
            HTTPException: there is no last one.
        """
        is_now = not self._is_owed and await self._heard(ANSWER_TIMEOUT_S)
        age_s = 0.0 if is_now else round(self._age_s, 1)
        if self._last is None:
            raise HTTPException(504, f"the engine has not answered yet, not for {ANSWER_TIMEOUT_S:.0f} s now")
        return [{**status, "age_s": age_s} for status in self._last]

    async def run(self, tell: Callable[[list[Status]], None]) -> None:
        """Poll until cancelled.

        Args:
            tell: gets the statuses after each question, none while the engines are silent.
        """
        while True:
            self._asked_s = self._clock()
            problem = await self._ask_patiently()
            self._asked_s = None
            try:
                tell([] if problem else self._last or [])
            except Exception as e:
                problem = problem or f"{type(e).__name__}: {e}"
            self._note(problem)
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _ask_patiently(self) -> str:
        """Ask, and return why there is no answer; '' = there is one."""
        try:
            return "" if await self._heard(SILENT_AFTER_S) else f"no answer for {SILENT_AFTER_S:.0f} s"
        except Exception as e:  # the engine may be starting, stopping or dead
            return f"{type(e).__name__}: {e}"

    @property
    def _age_s(self) -> float:
        return self._clock() - self._heard_s

    @property
    def _is_owed(self) -> bool:
        """Whether the engines have kept the poll waiting, so that another question would only lengthen their queue."""
        return self._failed or (self._asked_s is not None and self._clock() - self._asked_s > ANSWER_TIMEOUT_S)

    async def _heard(self, timeout_s: float) -> bool:
        """Ask, and return whether all engines have answered in time."""
        try:
            async with asyncio.timeout(timeout_s):  # `wait_for` of Python 3.11 may swallow the cancellation at the end
                self._last = await self._ask()
        except TimeoutError:
            return False
        self._heard_s = self._clock()
        return True

    def _note(self, problem: str) -> None:
        if problem and not self._failed:
            logger.warning(
                "morphserve: no status from the engine (%s); until it answers its metrics are their age alone, and a "
                "policy's queue limit does not hold",
                problem,
            )
        if self._failed and not problem:
            logger.info("morphserve: the engine answers again")
        self._failed = bool(problem)
