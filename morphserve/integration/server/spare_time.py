"""`prepare: when_idle`, in the API server: it sees a request first, and no worker has bound it to cores.

The child that prepares is this process's own, so it ends with the server, whatever ends that.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from morphserve.integration.start import IdleWork, idle_work
from morphserve.prepared import Background, WhenIdle

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.protocol import EngineClient

logger = logging.getLogger("vllm.morphserve")

_INTERVAL_S = 0.05  # between two looks: so long, at most, a request shares the machine with what prepares


class SpareTime:
    """Watches for requests, and lets the model be prepared while there are none."""

    def __init__(self, engine_client: EngineClient | None) -> None:
        """Find out whether there is anything to do; without a client there is nothing."""
        self._client: Any = engine_client
        self._num_tokens: int | None = None
        self._is_busy = True  # until the engines have said otherwise
        self._preparation: WhenIdle | None = None
        self._work = work = None if engine_client is None else _find_work(engine_client.vllm_config)
        if engine_client is None or work is None:
            return
        if work.command:
            model = engine_client.vllm_config.model_config.model
            self._preparation = WhenIdle(lambda: Background(work.command, work.environment), model)
            atexit.register(self.close)
        elif work.is_missing:
            logger.warning("morphserve: prepare: when_idle can do nothing here: %s", work.why_not)

    def look(self, statuses: Sequence[dict[str, Any]]) -> None:
        """Take in what the engines have said of themselves, twice a second."""
        if self._preparation is None:
            return
        num_tokens = sum(status["quality"]["tokens"] for status in statuses)
        has_requests = any(status["num_running"] + status["num_waiting"] for status in statuses)
        self._is_busy = not statuses or has_requests or num_tokens != self._num_tokens
        self._num_tokens = num_tokens

    def as_json(self) -> dict[str, Any] | None:
        """Return plain values for the status; None where nobody asked for it."""
        if self._work is None:
            return None
        if self._preparation is None:
            state = "off" if self._work.is_missing else "done"
            return {"state": state, "part": "", "note": self._work.why_not, "begins_in_s": None}
        return self._preparation.as_json()

    async def run(self) -> None:
        """Look again and again, until the server ends."""
        preparation = self._preparation
        if preparation is None:
            return
        try:
            while True:
                preparation.tick(self._is_busy or self._client.get_num_unfinished_requests() > 0)
                await asyncio.sleep(_INTERVAL_S)
        except Exception:
            logger.exception("morphserve: prepare: when_idle gives up; the server goes on without it")
            await asyncio.to_thread(preparation.close)  # requests do not wait for it
        finally:
            preparation.close()

    def close(self) -> None:
        """End what prepares. Re-entrant."""
        if self._preparation is not None:
            self._preparation.close()


def _find_work(config: VllmConfig) -> IdleWork | None:
    try:
        return idle_work(config)
    except Exception as e:  # settings that were edited since, whatever is wrong with the files: the server is to start
        logger.warning("morphserve: prepare: when_idle does nothing (%s: %s)", type(e).__name__, e)
        return None
