"""What a level would do to the requests that are here and to those that are forecast.

A fluid model of a continuous-batching engine: `n` sequences share a step, whose time is linear in what is in it
(policies/step_times.py); the KV cache bounds `n`; who does not fit waits for those that end. Closed forms only: a
prediction costs the number of cohorts, not of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, inf

from policies.promise import Promise
from policies.slo.lateness import Late, Moment, Tally, chance_late, either, kept_by_any, parts_of
from policies.slo.times import LevelTimes
from policies.step_times import StepTime
from policies.types import Cohort, EngineLimits, Signals

_UNKNOWN_OUTPUT_TOKENS = 128.0  # until a request has ended
_PRIOR_REQUESTS = 4.0  # of mean size, that the running ones are weighed against
_FORECAST_POINTS = 4
_LOST_WEIGHT = 0.2


@dataclass(frozen=True, slots=True)
class Typical:
    """The usual request of the moment."""

    prompt_tokens: float
    output_tokens: float
    final_blocks: float  # that it holds when it ends
    mean_blocks: float  # over its life
    mean_context: float  # tokens, over its decode steps

    @classmethod
    def of(cls, s: Signals, limits: EngineLimits) -> Typical:
        """Read the averages, as far as they are known."""
        size = limits.block_size
        held = s.used_kv_blocks / s.num_running if s.num_running else 1.0
        prompt = s.prompt_tokens or held * size
        output = s.output_tokens or max(s.blocks_per_request * size - prompt, 0.0) or _UNKNOWN_OUTPUT_TOKENS
        final = max((prompt + output) / size + 0.5, s.blocks_per_request, 1.0)
        mean = (prompt + output / 2) / size + 0.5
        # The long answers of a burst outlive the others: who runs at its end holds more than most do.
        seen = (s.used_kv_blocks + _PRIOR_REQUESTS * mean) / (s.num_running + _PRIOR_REQUESTS)
        mean = max(mean, seen)
        return cls(prompt, output, final, mean, (mean - 0.5) * size)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A level's prediction."""

    violations: float  # expected number of requests that break a promise though they could keep it
    requests: float  # that were looked at
    binds: bool  # KV keeps requests waiting, or will preempt them
    last_wait_s: float  # of the last request that waits, from now to its first token
    tpot_s: float

    def keeps(self, target: float) -> bool:
        """Return whether no larger share than that of the requests breaks its promise."""
        return self.violations <= target * max(self.requests, 1.0)

    @property
    def share(self) -> float:
        """Expected violations as a share of the requests, [0, 1]."""
        return self.violations / self.requests if self.requests > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """Predictions of some levels, in the order asked for."""

    promised: list[Prediction]  # each request by its own promise, where a level keeps that
    usual: list[Prediction]  # none by a stricter one than everyone's; the same list where that makes no difference
    keeps: list[list[bool]]  # for all with a stricter one, whether the level keeps it

    @property
    def has_stricter(self) -> bool:
        """Whether a stricter promise than everyone's counts."""
        return self.usual is not self.promised


@dataclass(frozen=True, slots=True)
class Load:
    """The state of the engine that all levels' predictions start from."""

    signals: Signals
    typical: Typical
    arrival_rate: float  # forecast
    horizon_s: float
    ttft_s: float  # promised
    tpot_s: float
    sigma: float  # relative error of a wait
    step_sigma: float  # of a step
    factor: float  # measured over predicted step time
    promise: Promise = Promise()  # what requests may have of their own

    @property
    def moment(self) -> Moment:
        """What decides who is lost already."""
        s = self.signals
        return Moment(s.now_s, s.step_s, s.tpot_s, self.typical.output_tokens, self.ttft_s)


@dataclass(frozen=True, slots=True)
class _Queue:
    """How long one level keeps whom waiting."""

    delay_s: float  # until it is reached
    room_now: float  # requests that fit at the level that is, and need not wait for that
    room: float  # requests that fit there
    release: float  # that end per second
    prefill_s: float  # a token
    step_s: float
    tpot_s: float
    slow: float  # chance that everyone's limit on the time per token is broken by who is served
    sigma: float

    def wait_s(self, ahead: float, tokens_ahead: float) -> float:
        """Return the seconds until the first token of who has so many requests and tokens before it."""
        queue_s = 0.0 if ahead < self.room else (ahead - self.room + 1.0) / self.release
        delay_s = 0.0 if ahead < self.room_now else self.delay_s
        return delay_s + max(queue_s, 0.0) + tokens_ahead * self.prefill_s + self.step_s

    def late(self, cohort: Cohort, place: tuple[float, float], at: Moment, limit_s: float) -> Late:
        """Judge a cohort that has so many requests and tokens before it by a limit."""
        violations = requests = 0.0
        ahead, tokens = place
        for part in parts_of(cohort, limit_s, self.tpot_s, at):
            wait = self.wait_s(ahead + (part.num_requests - 1) / 2, tokens + part.num_tokens / 2)
            ahead, tokens = ahead + part.num_requests, tokens + part.num_tokens
            weight = part.num_requests * (_LOST_WEIGHT if part.is_lost else 1.0)
            violations += weight * either(chance_late(wait, part.left_s, self.sigma), self.slow)
            requests += weight
        return Late(violations, requests)


@dataclass(frozen=True, slots=True)
class _Outlook:
    """A level's prediction, but for whose own promise counts."""

    tally: Tally
    binds: bool
    last_wait_s: float
    tpot_s: float

    def settled(self, is_kept: Sequence[bool]) -> Prediction:
        late = self.tally.total(is_kept)
        return Prediction(late.violations, late.requests, self.binds, self.last_wait_s, self.tpot_s)


class Predictor:
    """Predictions for all levels of one ladder on one machine."""

    def __init__(self, usable_blocks: Sequence[int], times: LevelTimes, limits: EngineLimits) -> None:
        self._usable = usable_blocks
        self._times = times
        self._limits = limits

    def predict(self, level: int, load: Load, delay_s: float) -> Prediction:
        """Predict `level`, reached in `delay_s`."""
        return self.compare([(level, delay_s)], load).promised[0]

    def compare(
        self, ways: Sequence[tuple[int, float]], load: Load, is_kept: Sequence[bool] | None = None
    ) -> Comparison:
        """Predict levels, each reached in so many seconds.

        Args:
            ways: levels and seconds.
            load: as it is.
            is_kept: of each request's own promise that is stricter than everyone's, whether it counts; None = where
                one of these levels keeps it.
        """
        at = load.moment
        outlooks = [self._outlook(level, load, delay_s, at) for level, delay_s in ways]
        keeps = [outlook.tally.keeps() for outlook in outlooks]
        is_kept = kept_by_any(keeps) if is_kept is None else is_kept
        promised = [outlook.settled(is_kept) for outlook in outlooks]
        if not any(is_kept):
            return Comparison(promised, promised, keeps)
        return Comparison(promised, [outlook.settled([False] * len(is_kept)) for outlook in outlooks], keeps)

    def alone_ttft_s(self, level: int, load: Load) -> float:
        """Return what a usual request takes to its first token with nobody else here."""
        prompt_tokens = load.typical.prompt_tokens
        return load.factor * self._times[level].seconds(1, prompt_tokens - 1, prompt_tokens)

    def alone_tpot_s(self, level: int, load: Load) -> float:
        """Return what a usual request takes for each further token with nobody else here."""
        return load.factor * self._times[level].seconds(1, 0, load.typical.mean_context)

    def _outlook(self, level: int, load: Load, delay_s: float, at: Moment) -> _Outlook:
        s, typical, time = load.signals, load.typical, self._times[level]
        usable = self._usable[level]
        seats = self._seats(usable, typical)
        here = min(usable, self._usable[min(s.level, len(self._usable) - 1)])
        room = self._fits(usable, load)
        room_now = room if here == usable else self._fits(here, load)
        release = _release_rate(time, load, seats)  # nobody waits before all seats are taken
        crowd = min(seats, max(s.num_running + s.num_waiting, self._steady(time, load)))
        tpot_s = _tpot_s(time, load, max(crowd, 1.0))
        prefill_s = time.per_prefill_token_s * load.factor
        step_s = time.seconds(max(s.num_running, 1), 0, s.num_running * typical.mean_context) * load.factor
        slow = chance_late(tpot_s, load.tpot_s, load.step_sigma)
        queue = _Queue(delay_s, room_now, room, release, prefill_s, step_s, tpot_s, slow, load.sigma)
        tally = Tally()
        ahead, tokens = self._waiting(queue, load, at, tally)
        coming = self._forecast(time, load, ahead, queue)
        tally.add(coming)
        squeezed = self._running(load, seats, release, tpot_s, tally)
        binds = squeezed or ahead > room or (coming.requests > 0 and self._overflows(load, room - ahead, release))
        return _Outlook(tally, binds, queue.wait_s(max(ahead - 1, 0.0), tokens), tpot_s)

    def _waiting(self, queue: _Queue, load: Load, at: Moment, tally: Tally) -> tuple[float, float]:
        """Judge who waits; return how many requests and tokens that are."""
        ahead = tokens = 0.0
        promise = load.promise
        for cohort in load.signals.waiting:
            by = partial(queue.late, cohort, (ahead, tokens), at)
            if cohort.has_token:
                tally.judge(promise.own_tpot_s(cohort.tpot_s), load.tpot_s, by)
            else:
                tally.judge(promise.own_ttft_s(cohort.ttft_s), load.ttft_s, by)
            ahead, tokens = ahead + cohort.num_requests, tokens + cohort.num_tokens
        return ahead, tokens

    def _seats(self, usable_blocks: int, typical: Typical) -> float:
        """Return how many sequences the KV cache, and the engine's own limit, let run side by side."""
        return max(min(float(self._limits.max_num_seqs), usable_blocks / typical.mean_blocks), 1.0)

    def _fits(self, usable_blocks: int, load: Load) -> float:
        """Return how many requests, of which each takes its mean, fit beside those that run while these grow."""
        s, typical = load.signals, load.typical
        need = max(float(s.used_kv_blocks), s.num_running * typical.mean_blocks)
        seats = self._seats(usable_blocks, typical) - s.num_running
        return max(0.0, min(seats, (usable_blocks - need) / typical.mean_blocks))

    def release_rate(self, level: int, load: Load) -> float:
        """Return how many requests end per second while others wait."""
        return _release_rate(self._times[level], load, self._seats(self._usable[level], load.typical))

    def _steady(self, time: StepTime, load: Load) -> float:
        """Return how many run side by side once arrivals and ends balance (Little's law); many where they never do."""
        tpot_s = _lasting_tpot_s(time, load, load.arrival_rate)
        return load.arrival_rate * load.typical.output_tokens * tpot_s if tpot_s < inf else self._limits.max_num_seqs

    def lasting_tpot_s(self, level: int, load: Load, rate: float) -> float:
        """Return the time per output token once arrivals at a rate and ends balance; infinite where they never do."""
        return _lasting_tpot_s(self._times[level], load, rate)

    def lasting_rate(self, level: int, load: Load) -> float:
        """Return how many requests per second a level serves for long, by its KV and by the time per output token."""
        return min(_computed_rate(self._times[level], load), self.release_rate(level, load))

    def served_rate(self, level: int, load: Load) -> float:
        """Return how many requests per second a level serves until the horizon.

        By the time per output token as `lasting_rate`. By KV so many that all seats are taken then, if each that is
        here is as likely to end at any moment as at any other (M/M/inf).
        """
        time, usable = self._times[level], self._usable[level]
        seats = self._seats(usable, load.typical)
        here = seats - self._fits(usable, load) + load.signals.num_waiting
        ends_per_s = _release_rate(time, load, seats) / seats  # of each that is here
        left = exp(-ends_per_s * load.horizon_s)
        by_kv = ends_per_s * max(seats - here * left, 0.0) / (1.0 - left)
        return min(_computed_rate(time, load), by_kv)

    def full_step_s(self, level: int, load: Load) -> float:
        """Return the time of a step of as many sequences as the engine lets run, without their prefill."""
        most = self._limits.max_num_seqs
        return self._times[level].seconds(most, 0, most * load.typical.mean_context)

    def _forecast(self, time: StepTime, load: Load, ahead: float, at: _Queue) -> Late:
        """Return expected violations among those that come within the horizon behind so many, and how many come."""
        number = load.arrival_rate * load.horizon_s
        if number <= 0:
            return Late(0.0, 0.0)
        each, late = number / _FORECAST_POINTS, 0.0
        prefill_s = load.typical.prompt_tokens * time.per_prefill_token_s * load.factor
        for point in range(_FORECAST_POINTS):
            at_s = (point + 0.5) / _FORECAST_POINTS * load.horizon_s
            before = ahead + (load.arrival_rate - at.release) * at_s  # who comes then
            wait = prefill_s + (max(at.delay_s - at_s, 0.0) if before >= at.room_now else 0.0)
            if before > at.room:
                wait += (before - at.room) / at.release
            late += each * either(chance_late(wait, load.ttft_s, load.sigma), at.slow)
        return Late(late, number)

    def _overflows(self, load: Load, room: float, release: float) -> bool:
        """Return whether the KV cache is full before the horizon."""
        return (load.arrival_rate - release) * load.horizon_s > room

    def _running(self, load: Load, seats: float, release: float, tpot_s: float, tally: Tally) -> bool:
        """Judge those that run, each by its own limit, and return whether they outgrow the KV cache."""
        s = load.signals
        if not s.num_running:
            return False
        evicted = max(0.0, s.num_running - seats) / s.num_running
        # A preempted request waits until as many have ended, in the middle of its answer.
        gap_s = evicted * s.num_running / 2 / release / load.typical.output_tokens

        def late(number: float, limit_s: float) -> Late:
            stays = chance_late(tpot_s, limit_s, load.step_sigma)
            leaves = chance_late(tpot_s + gap_s, limit_s, load.sigma) if evicted else 0.0
            return Late(number * ((1 - evicted) * stays + evicted * leaves), number)

        others = float(s.num_running)
        for own in s.running_limits:
            number = min(float(own.num_requests), others)  # a step may have ended some of them
            others -= number
            tally.judge(load.promise.own_tpot_s(own.limit_s), load.tpot_s, partial(late, number))
        tally.add(late(others, load.tpot_s))
        return evicted * s.num_running >= 1.0


def _tpot_s(time: StepTime, load: Load, num_seqs: float) -> float:
    """Return the time per output token with so many side by side, their successors' prefill included."""
    typical = load.typical
    prefill_tokens = num_seqs * typical.prompt_tokens / typical.output_tokens
    return load.factor * time.seconds(num_seqs, prefill_tokens, num_seqs * typical.mean_context)


def _release_rate(time: StepTime, load: Load, num_seqs: float) -> float:
    """Return how many requests end per second with so many side by side."""
    return num_seqs / (load.typical.output_tokens * _tpot_s(time, load, num_seqs))


def _lasting_tpot_s(time: StepTime, load: Load, rate: float) -> float:
    """Return the time per output token once arrivals at a rate and ends balance; infinite where they never do."""
    share = rate * load.factor * _each_s(time, load)
    return load.factor * time.base_s / (1.0 - share) if share < 1.0 else inf


def _computed_rate(time: StepTime, load: Load) -> float:
    """Return at how many requests per second a step takes everyone's time per output token."""
    free = max(1.0 - load.factor * time.base_s / load.tpot_s, 0.0)
    each_s = load.factor * _each_s(time, load)
    return free / each_s if each_s else inf


def _each_s(time: StepTime, load: Load) -> float:
    """Return what a usual request adds to the time of all steps of its life."""
    typical = load.typical
    return time.per_prefill_token_s * typical.prompt_tokens + typical.output_tokens * (
        time.per_seq_s + time.per_context_token_s * typical.mean_context
    )
