"""Engine events folded into rolling figures: constant cost per event, constant memory."""

from __future__ import annotations

from math import exp
from typing import TYPE_CHECKING

from morphserve.waiting import NO_LIMITS, RequestLimits, WaitingBook
from policies.types import Signals, StepLoad

if TYPE_CHECKING:  # the controller package imports this module
    from morphserve.controller.ports import EngineView

_LATENCY_TAU_S = 5.0  # time constant of the latency averages
_REQUEST_SIZE_TAU_S = 30.0  # requests end rarely; remember their size for longer
_WINDOW_S = 10.0
_NUM_BUCKETS = 20
_MIN_SPAN_S = 1.0  # one event in the first instant is no high rate
_MAX_STEP_S = 10.0  # a longer gap between two steps is idle time that nobody reported
_FORGOTTEN = 1e-9  # a weight so small that only the newest value counts


class DecayingMean:
    """Mean of values whose weight decays with age; values of one instant count alike.

    An average with a fixed factor per event would forget a burst's first values within the burst,
    and remember a quiet hour's for ever.
    """

    __slots__ = ("_last_s", "_sum", "_tau_s", "_weight")

    def __init__(self, tau_s: float) -> None:
        self._tau_s = tau_s
        self._sum = 0.0
        self._weight = 0.0
        self._last_s = 0.0

    def add(self, now_s: float, value: float, weight: float = 1.0) -> None:
        """Fold in one value."""
        decay = exp(-max(now_s - self._last_s, 0.0) / self._tau_s)
        self._last_s = max(now_s, self._last_s)
        if self._weight * decay < _FORGOTTEN:
            decay = 0.0
        self._sum = self._sum * decay + value * weight
        self._weight = self._weight * decay + weight

    @property
    def value(self) -> float:
        """The mean, 0 before the first value. It does not decay towards 0 in quiet times."""
        return self._sum / self._weight if self._weight > 0 else 0.0


class WindowRate:
    """Events per second over the last `_WINDOW_S`, in a fixed number of buckets."""

    __slots__ = ("_buckets", "_index", "_start_s", "_total", "_width_s")

    def __init__(self) -> None:
        self._width_s = _WINDOW_S / _NUM_BUCKETS
        self._buckets = [0] * _NUM_BUCKETS
        self._total = 0
        self._index: int | None = None  # number of the newest bucket since the clock's zero
        self._start_s = 0.0

    def add(self, now_s: float) -> None:
        """Count one event."""
        self._advance(now_s)
        assert self._index is not None
        self._buckets[self._index % _NUM_BUCKETS] += 1
        self._total += 1

    def rate(self, now_s: float) -> float:
        """Events per second; over the time since the first use while that is shorter than the window."""
        self._advance(now_s)
        assert self._index is not None
        oldest_s = max((self._index - _NUM_BUCKETS + 1) * self._width_s, self._start_s)
        return self._total / max(now_s - oldest_s, _MIN_SPAN_S)

    def _advance(self, now_s: float) -> None:
        """Empty the buckets that time has passed: at most all of them, however long the gap."""
        index = int(now_s // self._width_s)
        if self._index is None:
            self._index = index
            self._start_s = now_s
        for passed in range(self._index + 1, min(index, self._index + _NUM_BUCKETS) + 1):
            self._total -= self._buckets[passed % _NUM_BUCKETS]
            self._buckets[passed % _NUM_BUCKETS] = 0
        self._index = max(index, self._index)


class Monitor:
    """What the policy needs to know of the past, without keeping the past.

    Call `on_idle` when the engine has run out of work, so that the gap to the next step is not
    taken for a slow step; an empty `EngineView` in `snapshot` says the same.
    """

    def __init__(self) -> None:
        self._queue_delay = DecayingMean(_LATENCY_TAU_S)
        self._ttft = DecayingMean(_LATENCY_TAU_S)
        self._tpot = DecayingMean(_LATENCY_TAU_S)
        self._step = DecayingMean(_LATENCY_TAU_S)
        self._blocks = DecayingMean(_REQUEST_SIZE_TAU_S)
        self._prompt = DecayingMean(_REQUEST_SIZE_TAU_S)
        self._output = DecayingMean(_REQUEST_SIZE_TAU_S)
        self._arrivals = WindowRate()
        self._preempted = WindowRate()
        self._preemptions = 0
        self._num_arrivals = 0
        self._waiting = WaitingBook()
        self._tpot_limits: dict[str, float] = {}  # running request |-> its own limit, if it has one
        self._tightest_tpot_s: float | None = None
        self._last_step_s: float | None = None
        self._last_step: StepLoad | None = None
        self._now_s = 0.0  # newest time seen, for events that carry none

    def on_arrival(
        self,
        now: float,
        request_id: str = "",
        num_tokens: int = 0,
        limits: RequestLimits = NO_LIMITS,
        priority: int = 0,
    ) -> None:
        """A request with a prompt of `num_tokens` entered the waiting queue."""
        self._now_s = now
        self._arrivals.add(now)
        self._num_arrivals += 1
        if num_tokens:
            self._prompt.add(now, float(num_tokens))
            self._waiting.add(request_id, now, num_tokens, limits=limits, priority=priority)

    def on_scheduled(self, now: float, wait_s: float, request_id: str = "", tpot_limit_s: float | None = None) -> None:
        """A request was scheduled for the first time, `wait_s` after its arrival."""
        self._now_s = now
        self._queue_delay.add(now, wait_s)
        self.on_resumed(request_id, tpot_limit_s)

    def on_resumed(self, request_id: str, tpot_limit_s: float | None = None) -> None:
        """A request runs that waited."""
        self._waiting.remove(request_id)
        if tpot_limit_s is not None:
            self._tpot_limits[request_id] = tpot_limit_s
            self._tightest_tpot_s = min(self._tpot_limits.values())

    def on_first_token(self, ttft_s: float) -> None:
        """A request got its first token, `ttft_s` after its arrival."""
        self._ttft.add(self._now_s, ttft_s)

    def on_preemption(
        self,
        now: float,
        request_id: str = "",
        num_tokens: int = 0,
        limits: RequestLimits = NO_LIMITS,
        priority: int = 0,
        has_token: bool = True,
    ) -> None:
        """A running request lost its blocks and waits again, with `num_tokens` to compute."""
        self._now_s = now
        self._preemptions += 1
        self._preempted.add(now)
        self._leaves_running(request_id)
        if num_tokens:
            self._waiting.add(request_id, now, num_tokens, limits=limits, priority=priority, has_token=has_token)

    def on_finish(self, num_blocks: int, now: float, request_id: str = "", output_tokens: int = 0) -> None:
        """A request ended, for whatever reason, holding `num_blocks`; 0 = it never ran."""
        self._now_s = now
        self._waiting.remove(request_id)
        self._leaves_running(request_id)
        if num_blocks > 0:
            self._blocks.add(now, float(num_blocks))
            if output_tokens > 0:
                self._output.add(now, float(output_tokens))

    def on_step(
        self, now: float, num_decodes: int, num_seqs: int = 0, prefill_tokens: int = 0, context_tokens: int = 0,
        level: int | None = None,
    ) -> None:
        """An engine step has ended, in which `num_decodes` requests got one more token.

        Args:
            num_seqs, prefill_tokens, context_tokens: as in `StepLoad`.
            level: all layers of the step ran at; None = something else took a part of its time.
        """
        self._now_s = now
        last, self._last_step_s = self._last_step_s, now
        self._last_step = None
        if last is None or not 0 < now - last <= _MAX_STEP_S:
            return
        self._step.add(now, now - last)
        if num_decodes > 0:
            self._tpot.add(now, now - last, num_decodes)
        if level is not None and num_seqs > 0:
            self._last_step = StepLoad(now - last, num_seqs, prefill_tokens, context_tokens, level)

    @property
    def last_step(self) -> StepLoad | None:
        """The step that ended last; None when something else took a part of its time."""
        return self._last_step

    def _leaves_running(self, request_id: str) -> None:
        if self._tpot_limits.pop(request_id, None) is not None:
            self._tightest_tpot_s = min(self._tpot_limits.values(), default=None)

    def on_idle(self) -> None:
        """The engine has no work: the time until the next step is no step time."""
        self._last_step_s = None

    def snapshot(
        self,
        now: float,
        view: EngineView,
        num_kv_blocks: int,
        used_kv_blocks: int,
        level: int,
        target_level: int,
    ) -> Signals:
        """The engine at this step boundary."""
        self._now_s = now
        if view.num_running == 0 and view.num_waiting == 0:
            self.on_idle()
        return Signals(
            now_s=now,
            level=level,
            target_level=target_level,
            num_kv_blocks=num_kv_blocks,
            used_kv_blocks=used_kv_blocks,
            num_waiting=view.num_waiting,
            num_running=view.num_running,
            oldest_wait_s=view.oldest_wait_s,
            preemptions=self._preemptions,
            preemption_rate=self._preempted.rate(now),
            arrival_rate=self._arrivals.rate(now),
            queue_delay_s=self._queue_delay.value,
            ttft_s=self._ttft.value,
            tpot_s=self._tpot.value,
            step_s=self._step.value,
            blocks_per_request=self._blocks.value,
            waiting=self._waiting.cohorts(),
            last_step=self._last_step,
            prompt_tokens=self._prompt.value,
            output_tokens=self._output.value,
            num_arrivals=self._num_arrivals,
            tightest_tpot_s=self._tightest_tpot_s,
        )
