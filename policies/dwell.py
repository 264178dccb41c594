"""How long a shallower level must have done before it is taken."""

from __future__ import annotations

_REENTRY_S = 20.0  # degrading so soon after a restore means that the restore was too early
_GROWTH = 2.0
_GROWS_FROM_S = 0.5  # what doubling starts from where the shortest dwell is (almost) zero
_LONGEST_S = 5.0  # level 0 must be reached within 10 s of the queue's end, so dwell stays below
_DECAY_S = 30.0  # quiet time that halves a grown dwell


class Dwell:
    """A dwell that doubles after a restore that came too early, and halves in quiet time."""

    def __init__(self, shortest_s: float) -> None:
        self._shortest_s = shortest_s
        self.seconds = shortest_s
        self._restored_s = float("-inf")
        self._reentry_s = float("-inf")

    def decay(self, now_s: float) -> None:
        """Halve a dwell that has grown, again after each quiet time."""
        while self.seconds > self._shortest_s and now_s - self._reentry_s >= _DECAY_S:
            self.seconds = max(self._shortest_s, self.seconds / _GROWTH)
            self._reentry_s += _DECAY_S

    def degraded(self, now_s: float) -> None:
        """Double the dwell if the last restore was so short ago that it was wrong; one restore is blamed once."""
        if now_s - self._restored_s < _REENTRY_S + self.seconds:
            self.seconds = max(self._shortest_s, min(_GROWTH * max(self.seconds, _GROWS_FROM_S), _LONGEST_S))
            self._reentry_s, self._restored_s = now_s, float("-inf")

    def restored(self, now_s: float) -> None:
        """Remember the restore, which the next degrade may show to be wrong."""
        self._restored_s = now_s
