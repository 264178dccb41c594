"""How many requests will come: exponential averages, a trend, and two alarms for bursts."""

from __future__ import annotations

from math import exp, inf, log

_BIN_S = 0.25
_FAST_TAU_S = 1.5
_SLOW_TAU_S = 15.0
_LONG_TAU_S = 60.0  # of the averages that say whether level 0 serves what comes
_LATELY = 0.8  # of the slow average is to be served now: what is served, and that average, scatter by a fifth
_NEWS = 2.0  # times what is usual are a burst, or a load that has just begun
_ALARM = 4.0  # CUSUM: logarithm of how much likelier a burst is than that average
_MOST_SURE = 12.0  # counts of what is beyond level 0: a long burst is over a few seconds after its last requests
_EASY_SHARE = 0.5  # of what level 0 serves for long: twice as many are all that it serves
_LEAST_RATE = 0.2  # a second: twice as many of fewer are no load
_LEAST_SEEN = 0.25  # of the slow average's memory: what was seen counts as at least that long
_MAX_TREND_GAIN = 2.0  # the forecast is at most so many times what was seen


class _Alarm:
    """A one-sided CUSUM over bins: how much likelier twice the usual rate makes their Poisson counts than that rate."""

    def __init__(self, most: float = inf) -> None:
        """Begin silent. `most`: how sure it gets of a burst, and so how long without arrivals takes that back."""
        self.rings = False
        self._sum = 0.0
        self._most = most

    def update(self, count: int, width_s: float, usual: float, fast: float, back_at: float) -> None:
        """Take in a bin. It rings until the fast average is back."""
        self._sum = min(max(0.0, self._sum + count * log(_NEWS) - (_NEWS - 1.0) * usual * width_s), self._most)
        if self._sum > _ALARM:
            self.rings = True
        elif self.rings and fast <= back_at:
            self.rings, self._sum = False, 0.0


class ArrivalForecast:
    """Requests per second over the next seconds.

    In steady traffic the slow average, which forgets noise. Once a burst is likelier than that, the fast one with its
    trend, until it is back at the slow. None once nobody has come for as long as the slow one remembers.
    """

    def __init__(self) -> None:
        self._bin_end_s: float | None = None
        self._count_at_bin = 0
        self._fast = 0.0
        self._slow = 0.0
        self._seen = 0.0  # weight in it of what was seen, [0, 1]
        self._served = self._long_served = self._long = 0.0  # what level 0 serves: now, a minute's mean; what came
        self._before = 0.0  # fast average one fast time constant ago, roughly
        self._rise, self._burst = _Alarm(), _Alarm(_MOST_SURE)
        self._silent_s = 0.0  # since somebody came

    @property
    def alarm(self) -> bool:
        """Whether more come than usual, however few that is."""
        return self._rise.rings

    @property
    def is_burst(self) -> bool:
        """Whether more come than usual, and than level 0 serves with ease."""
        return self._burst.rings

    @property
    def is_served(self) -> bool:
        """Whether level 0 serves what comes: over a minute, and about so lately.

        Not where twice the minute's average comes: of that the minute knows nothing.
        """
        lately = self._served >= _LATELY * self.slow and _NEWS * self._long >= self.slow
        return lately and 0 < self._long <= self._long_served and not self._rise.rings

    def update(self, now_s: float, num_arrivals: int, served: float = 0.0) -> None:
        """Take in how many have arrived since start. O(1): a gap counts as one long empty bin.

        Args:
            now_s: monotonic clock.
            num_arrivals: since start.
            served: requests per second that level 0 serves for long.
        """
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
        slow = max(self.slow, _LEAST_RATE)  # without this bin
        self._before += (self._fast - self._before) * (1 - exp(-width_s / _FAST_TAU_S))
        self._fast += (rate - self._fast) * (1 - exp(-width_s / _FAST_TAU_S))
        self._slow += (rate - self._slow) * (1 - exp(-width_s / _SLOW_TAU_S))
        self._served = served
        self._long += (rate - self._long) * (1 - exp(-width_s / _LONG_TAU_S))
        self._long_served += (served - self._long_served) * (1 - exp(-width_s / _LONG_TAU_S))
        self._seen += (1.0 - self._seen) * (1 - exp(-width_s / _SLOW_TAU_S))
        if self._silent_s > _SLOW_TAU_S:  # averages would remember a crowd for minutes
            self._before = self._fast = self._slow = 0.0
        self._rise.update(count, width_s, slow, self._fast, self.slow)
        # What was never seen is taken for what level 0 serves with ease.
        easy = max(_EASY_SHARE * served, _LEAST_RATE)
        usual = max(self._slow + (1.0 - self._seen) * easy, easy)
        self._burst.update(count, width_s, usual, self._fast, usual)

    @property
    def slow(self) -> float:
        """The slow average of what was seen, however short that was."""
        return self._slow / max(self._seen, _LEAST_SEEN)

    def rate(self, horizon_s: float) -> float:
        """Return the mean of requests per second over the next `horizon_s`."""
        if not self._rise.rings:
            return self.slow
        # Bursts end: the trend counts for half of the horizon at most, and cannot multiply what was seen.
        slope = (self._fast - self._before) / _FAST_TAU_S
        ahead = self._fast + slope * min(horizon_s, _FAST_TAU_S) / 2
        return min(max(ahead, self.slow), _MAX_TREND_GAIN * max(self._fast, self.slow))
