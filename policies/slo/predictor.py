"""What a level would do to the requests that are here and to those that are forecast.

A fluid model of a continuous-batching engine: `n` sequences share a step, whose time is linear in what is in it
(policies/step_times.py); the KV cache bounds `n`; who does not fit waits for those that end. Closed forms only: a
prediction costs the number of cohorts, not of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import erfc, log, sqrt

from policies.slo.level_times import LevelTimes
from policies.types import Cohort, EngineLimits, Signals

_UNKNOWN_OUTPUT_TOKENS = 128.0  # until a request has ended
_PRIOR_REQUESTS = 4.0  # of mean size, that the running ones are weighed against
_FORECAST_POINTS = 4
_LOST_WEIGHT = 0.2
_SQRT2 = sqrt(2.0)


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

    @property
    def share(self) -> float:
        """Expected violations as a share of the requests, [0, 1]."""
        return self.violations / self.requests if self.requests > 0 else 0.0


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


class Predictor:
    """Predictions for all levels of one ladder on one machine."""

    def __init__(self, usable_blocks: Sequence[int], times: LevelTimes, limits: EngineLimits) -> None:
        self._usable = usable_blocks
        self._times = times
        self._limits = limits

    def predict(self, level: int, load: Load, delay_s: float) -> Prediction:
        """Predict `level`, reached in `delay_s`."""
        s, typical, time = load.signals, load.typical, self._times[level]
        usable = self._usable[level]
        seats = self._seats(usable, typical)
        need = max(float(s.used_kv_blocks), s.num_running * typical.mean_blocks)
        # Room now: what stays free while those that run grow, in requests of which each takes its mean.
        room = max(0.0, min(seats - s.num_running, (usable - need) / typical.mean_blocks))
        release = self._release_rate(level, load, seats)  # nobody waits before all seats are taken
        crowd = min(seats, max(s.num_running + s.num_waiting, self._steady(level, load)))
        tpot_s = self.tpot_s(level, load, max(crowd, 1.0))
        prefill_s = time.per_prefill_token_s * load.factor
        step_s = time.seconds(max(s.num_running, 1), 0, s.num_running * typical.mean_context) * load.factor

        def wait_s(ahead: float, tokens_ahead: float) -> float:
            """Return the seconds until the first token of who has so many requests and tokens before it."""
            queue_s = 0.0 if ahead < room else (ahead - room + 1.0) / release
            return delay_s + max(queue_s, 0.0) + tokens_ahead * prefill_s + step_s

        violations = requests = ahead = tokens = 0.0
        for cohort in s.waiting:
            for part in _parts(cohort, load, tpot_s):
                wait = wait_s(ahead + (part.num_requests - 1) / 2, tokens + part.num_tokens / 2)
                ahead, tokens = ahead + part.num_requests, tokens + part.num_tokens
                weight = part.num_requests * (_LOST_WEIGHT if part.is_lost else 1.0)
                violations += weight * _late(wait, part.left_s, load.sigma)
                requests += weight
        last_wait_s = wait_s(max(ahead - 1, 0.0), tokens)
        more, number = self._forecast(level, load, room - ahead, release, delay_s)
        violations += more
        requests += number
        running, squeezed = self._running(load, seats, release, tpot_s)
        binds = squeezed or ahead > room or (number > 0 and self._overflows(load, room - ahead, release))
        return Prediction(violations + running, requests + s.num_running, binds, last_wait_s, tpot_s)

    def _seats(self, usable_blocks: int, typical: Typical) -> float:
        """Return how many sequences the KV cache, and the engine's own limit, let run side by side."""
        return max(min(float(self._limits.max_num_seqs), usable_blocks / typical.mean_blocks), 1.0)

    def tpot_s(self, level: int, load: Load, num_seqs: float) -> float:
        """Return the time per output token with so many side by side, their successors' prefill included."""
        time, typical = self._times[level], load.typical
        prefill_tokens = num_seqs * typical.prompt_tokens / typical.output_tokens
        return load.factor * time.seconds(num_seqs, prefill_tokens, num_seqs * typical.mean_context)

    def release_rate(self, level: int, load: Load) -> float:
        """Return how many requests end per second while others wait."""
        return self._release_rate(level, load, self._seats(self._usable[level], load.typical))

    def _release_rate(self, level: int, load: Load, num_seqs: float) -> float:
        """Return how many requests end per second with so many side by side."""
        return num_seqs / (load.typical.output_tokens * self.tpot_s(level, load, num_seqs))

    def _steady(self, level: int, load: Load) -> float:
        """Return how many run side by side once arrivals and ends balance (Little's law); many where they never do."""
        time, typical, rate = self._times[level], load.typical, load.arrival_rate * load.factor
        share = rate * (
            time.per_prefill_token_s * typical.prompt_tokens
            + typical.output_tokens * (time.per_seq_s + time.per_context_token_s * typical.mean_context)
        )
        if share >= 1.0:
            return float(self._limits.max_num_seqs)
        return rate * typical.output_tokens * time.base_s / (1.0 - share)

    def _forecast(self, level: int, load: Load, room: float, release: float, delay_s: float) -> tuple[float, float]:
        """Return expected violations among those that come within the horizon, and how many come."""
        number = load.arrival_rate * load.horizon_s
        if number <= 0:
            return 0.0, 0.0
        each, late = number / _FORECAST_POINTS, 0.0
        prefill_s = load.typical.prompt_tokens * self._times[level].per_prefill_token_s * load.factor
        for point in range(_FORECAST_POINTS):
            at_s = (point + 0.5) / _FORECAST_POINTS * load.horizon_s
            queue = load.arrival_rate * at_s - room - release * at_s
            wait = max(delay_s - at_s, 0.0) + prefill_s
            if queue > 0:
                wait += queue / release
            late += each * _late(wait, load.ttft_s, load.sigma)
        return late, number

    def _overflows(self, load: Load, room: float, release: float) -> bool:
        """Return whether the KV cache is full before the horizon."""
        return (load.arrival_rate - release) * load.horizon_s > room

    def _running(self, load: Load, seats: float, release: float, tpot_s: float) -> tuple[float, bool]:
        """Return expected violations among those that run, and whether they outgrow the KV cache."""
        s = load.signals
        if not s.num_running:
            return 0.0, False
        limit = min(load.tpot_s, s.tightest_tpot_s or load.tpot_s)
        evicted = max(0.0, s.num_running - seats)
        # A preempted request waits until as many have ended, in the middle of its answer.
        gap_s = evicted / 2 / release / load.typical.output_tokens
        stay = s.num_running - evicted
        late = stay * _late(tpot_s, limit, load.step_sigma) + evicted * _late(tpot_s + gap_s, limit, load.sigma)
        return late, evicted >= 1.0


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a cohort: those that can still make it, or those that cannot."""

    num_requests: float
    num_tokens: float
    left_s: float  # from now to the limit
    is_lost: bool


def _parts(cohort: Cohort, load: Load, tpot_s: float) -> tuple[_Part, ...]:
    """Split a cohort, which came evenly between its first and its last, at those that are lost already.

    A lost request is no reason for any level to keep its promise, but its answer is still wanted: it counts a little,
    as one that has just come. Who is lost depends on the engine as it is: a level that would lose more pays for them.
    """
    s, output_tokens = load.signals, load.typical.output_tokens
    count, tokens, now_s, step_s = float(cohort.num_requests), float(cohort.num_tokens), s.now_s, s.step_s
    if cohort.has_token:  # may spend on waiting what its tokens leave of its time
        limit_s, waited_s = cohort.tpot_s or load.tpot_s, now_s - cohort.last_arrival_s
        spare_s = (limit_s - tpot_s) * output_tokens
        lost = (limit_s - s.tpot_s) * output_tokens - waited_s <= step_s
        return (_Part(count, tokens, max(spare_s, load.ttft_s) if lost else spare_s - waited_s, lost),)
    limit_s = cohort.ttft_s or load.ttft_s
    first, last = cohort.first_arrival_s, cohort.last_arrival_s
    alive_from = now_s - limit_s + step_s
    if alive_from <= first:
        return (_Part(count, tokens, (first + last) / 2 + limit_s - now_s, False),)
    if alive_from >= last:
        return (_Part(count, tokens, limit_s, True),)
    alive = (last - alive_from) / (last - first)
    return (
        _Part(count * (1 - alive), tokens * (1 - alive), limit_s, True),
        _Part(count * alive, tokens * alive, (alive_from + last) / 2 + limit_s - now_s, False),
    )


def _late(predicted: float, limit: float, sigma: float) -> float:
    """Return the probability that what is predicted to take so long takes longer than `limit` (log-normal error)."""
    if predicted <= 0:
        return 0.0
    if limit <= 0:
        return 1.0
    distance = log(predicted) - log(limit)  # not of the ratio: a limit may be as large as a float can be
    if abs(distance) > 6 * sigma:
        return 1.0 if distance > 0 else 0.0
    return 0.5 * erfc(-distance / (max(sigma, 1e-6) * _SQRT2))
