"""How many requests will come: exponential averages, a trend, and an alarm for bursts."""

from __future__ import annotations

from math import exp, log

_BIN_S = 0.25
_FAST_TAU_S = 1.5
_SLOW_TAU_S = 15.0
_NEWS = 2.0  # times the slow average are a burst
_ALARM = 4.0  # CUSUM: logarithm of how much likelier a burst is than that average
_LEAST_RATE = 0.2  # a second: twice as many of fewer are no load
_LEAST_SEEN = 0.25  # of the slow average's memory: what was seen counts as at least that long
_MAX_TREND_GAIN = 2.0  # the forecast is at most so many times what was seen


class ArrivalForecast:
    """Requests per second over the next seconds.

    In steady traffic the slow average, which forgets noise. Once a burst is likelier than that (a one-sided CUSUM over
    bins of 0.25 s of how much likelier twice the rate makes a Poisson count), the fast one with its trend, until it is
    back at the slow. None once nobody has come for as long as the slow one remembers.
    """

    def __init__(self) -> None:
        self._bin_end_s: float | None = None
        self._count_at_bin = 0
        self._fast = 0.0
        self._slow = 0.0
        self._seen = 0.0  # weight in it of what was seen, [0, 1]
        self._before = 0.0  # fast average one fast time constant ago, roughly
        self._cusum = 0.0
        self.alarm = False
        self._silent_s = 0.0  # since somebody came

    def update(self, now_s: float, num_arrivals: int) -> None:
        """Take in how many have arrived since start. O(1): a gap counts as one long empty bin."""
        if self._bin_end_s is None:
            self._bin_end_s, self._count_at_bin = now_s + _BIN_S, num_arrivals
            return
        if now_s < self._bin_end_s:
            return
        width_s = now_s - self._bin_end_s + _BIN_S
        self._bin_end_s = now_s + _BIN_S
        count, self._count_at_bin = num_arrivals - self._count_at_bin, num_arrivals
        self._silent_s = 0.0 if count else self._silent_s + width_s
        rate = count / width_s
        usual = max(self.slow, _LEAST_RATE)
        self._cusum = max(0.0, self._cusum + count * log(_NEWS) - (_NEWS - 1.0) * usual * width_s)
        self._before += (self._fast - self._before) * (1 - exp(-width_s / _FAST_TAU_S))
        self._fast += (rate - self._fast) * (1 - exp(-width_s / _FAST_TAU_S))
        self._slow += (rate - self._slow) * (1 - exp(-width_s / _SLOW_TAU_S))
        self._seen += (1.0 - self._seen) * (1 - exp(-width_s / _SLOW_TAU_S))
        if self._silent_s > _SLOW_TAU_S:  # averages would remember a crowd for minutes
            self._before = self._fast = self._slow = 0.0
        if self._cusum > _ALARM:
            self.alarm = True
        elif self.alarm and self._fast <= self.slow:
            self.alarm, self._cusum = False, 0.0

    @property
    def slow(self) -> float:
        """The slow average of what was seen, however short that was."""
        return self._slow / max(self._seen, _LEAST_SEEN)

    def rate(self, horizon_s: float) -> float:
        """Return the mean of requests per second over the next `horizon_s`."""
        if not self.alarm:
            return self.slow
        # Bursts end: the trend counts for half of the horizon at most, and cannot multiply what was seen.
        slope = (self._fast - self._before) / _FAST_TAU_S
        ahead = self._fast + slope * min(horizon_s, _FAST_TAU_S) / 2
        return min(max(ahead, self.slow), _MAX_TREND_GAIN * max(self._fast, self.slow))
