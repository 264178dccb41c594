"""What an error of ours may cost inside of a call of vLLM's, or in a thread: what we add there, and no more."""

from __future__ import annotations

import logging
from types import TracebackType

logger = logging.getLogger("vllm.morphserve")


class Spared:
    """A context that no error leaves. Re-entrant; the first is one warning with its stack, further ones are none."""

    def __init__(self, cost: str) -> None:
        """Warn of nothing yet; `cost`: what is gone where an error ends the block."""
        self._cost = cost
        self._has_warned = False

    def __enter__(self) -> None:
        """Hold nothing."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        """Let pass what is no error of the block: a cancellation, the end of the process."""
        if not isinstance(error, Exception):
            return False
        if not self._has_warned:
            self._has_warned = True
            logger.warning("morphserve: an error costs %s; further ones are not told of", self._cost, exc_info=error)
        return True
