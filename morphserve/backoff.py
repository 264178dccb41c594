"""How long what has failed must wait until it is tried again."""

from __future__ import annotations

from math import inf

_SECOND_S = 1.0  # after a first failure that was not waited for: twice nothing would be nothing for ever


class BackOff:
    """The waits after failures: each is twice as long as the one before, up to a limit."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        """Allow an attempt at once.

        Args:
            first_s: the wait after the first failure.
            longest_s: no later one is longer, where the first is not.
        """
        self._first_s = first_s
        self._longest_s = max(first_s, longest_s)
        self._next_wait_s = first_s
        self.not_before_s = -inf

    def allows(self, now_s: float) -> bool:
        """Return whether an attempt may start now."""
        return now_s >= self.not_before_s

    def failed(self, now_s: float) -> float:
        """Return how long nothing may start, in seconds."""
        wait_s = self._next_wait_s
        self._next_wait_s = min(2 * wait_s or _SECOND_S, self._longest_s)
        return self.hold(now_s + wait_s) - now_s

    def hold(self, until_s: float) -> float:
        """Allow none until then at least, though nothing has failed; return until when none is allowed."""
        self.not_before_s = max(self.not_before_s, until_s)
        return self.not_before_s

    def is_due(self, now_s: float) -> bool:
        """Return whether to ask again now for what was not to be had; the first wait begins with the first call."""
        if not self.allows(now_s):
            return False
        was_asked = self.not_before_s > -inf
        self.failed(now_s)
        return was_asked

    def release(self) -> None:
        """End the wait; one after another failure is longer all the same."""
        self.not_before_s = -inf

    def reset(self) -> None:
        """Forget all failures."""
        self.release()
        self._next_wait_s = self._first_s
