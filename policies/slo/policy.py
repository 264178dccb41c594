"""Predicts every level, and takes the one of least quality cost that keeps the promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from policies.config import SloConfig, ThresholdConfig
from policies.promise import promise_of
from policies.slo.choice import PutOff, Terms, for_burst, lasting, quick_end
from policies.slo.forecast import ArrivalForecast
from policies.slo.lateness import chance_late, has_lost, kept_by_any
from policies.slo.limits import QualityBudget, QueueLimit, TokenBucket
from policies.slo.own_limits import OwnLimits
from policies.slo.predictor import Comparison, Load, Prediction, Predictor, Typical
from policies.slo.reach import Reach
from policies.slo.rested import Rested, quick_dwell_s
from policies.slo.room import Room
from policies.slo.targets import costs_of, fill_in
from policies.slo.times import LAYERS_PER_STEP, CalibratedTimes, Correction, LearnedTimes, LevelTimes, layers_between
from policies.step_times import StepTimes
from policies.threshold import ThresholdPolicy
from policies.types import Decision, EngineLimits, Ladder, Predictions, Signals, StepLoad

_THINK_S = 0.05  # predictions are made anew this often at most; a preemption cannot wait
_HORIZON_PER_WAIT = 4.0  # arrivals are counted so many times as far ahead as the oldest request has waited,
_MAX_HORIZON_S = 15.0  # so far at most
_LATER_S = 0.25  # while level 0 serves the load a deeper level is put off if it would do so much later, too
_SAFETY = 1.15  # arrivals and errors are taken so much larger before a restore
_FILL_AFTER_RESTORE = 0.95  # of the blocks: a shallower level must hold what lives, with air
_LOST_TRUST = 0.9  # relative error of predictions beyond which thresholds decide
_TRUST_AGAIN = 0.6


@dataclass(frozen=True, slots=True)
class _Asked:
    """Which level is asked for."""

    level: int
    why_not: str  # it is not gone to as yet, though deeper; "" = it is
    usual: int  # by everyone's promise alone
    is_usual_due: bool  # that one is deeper than the last such, and not put off
    here: Prediction  # where the engine is, or is on its way to
    there: Prediction  # at `level`
    is_kept: list[bool]  # stricter promises, by this level or a shallower one
    has_stricter: bool  # such a promise counts


class SloPolicy:
    """A policy that predicts: deeper when that saves requests, shallower when that would have done for a dwell.

    1. Takes the level of least cost; one that computes slower only while KV binds, and for requests that it saves.
    2. Level changes stay within the token bucket; a way down is always paid for before a way up is taken.
    3. When predictions have been wrong, thresholds decide until they are right again, up to the level that computes
       fastest.
    4. So they do while no level keeps the promise even for a lone request: nothing that it says of levels is of use.
    """

    def __init__(self, config: SloConfig, ladder: Ladder, times: StepTimes | None, limits: EngineLimits) -> None:
        """Fix targets and predictions.

        Args:
            times: as calibration measured them; None = learned from the engine's steps, thresholds decide until then.

        Raises:
            ValueError: `max_level` is not on the ladder, a format of the ladder was never calibrated, or a quality
                budget is set for levels whose cost nobody knows.
        """
        self.targets = fill_in(config, ladder)
        self._config = config
        self._promise = promise_of(config)
        self._ladder = ladder[: self.targets.max_level + 1]
        self._layers_between = layers_between(self._ladder)
        self._times: LevelTimes = (
            LearnedTimes(ladder, limits.moves_beside_steps)
            if times is None
            else CalibratedTimes(times.of_ladder(ladder), times.move)
        )
        self._usable = [level.num_kv_blocks - 1 for level in ladder]
        self._costs = costs_of(ladder)
        self._predictor = Predictor(self._usable, self._times, limits)
        self._room = Room(self._usable, limits)
        self._reach = Reach(self._predictor, len(self._ladder))
        self._limits = limits
        self.correction = Correction(self._times, config.ttft_s, limits.sends_ahead)
        self._forecast = ArrivalForecast()
        self._served = 0.0  # requests per second that level 0 serves for long
        self._bucket = TokenBucket(config.transitions_per_minute)
        self.budget = QualityBudget(config.quality_budget)
        unknown = [level.index for level in ladder if level.index and level.expected_kl is None]
        if config.quality_budget is not None and unknown:
            raise ValueError(
                f"policy.quality_budget is in nats, and nobody has measured those of level {unknown[0]}. Set "
                "ladder.expected_kl (`morphserve measure-kl`) or a profile, or leave the budget out."
            )
        self._fallback = ThresholdPolicy(ThresholdConfig(kind="threshold", max_level=self.targets.max_level), ladder)
        self.distrusts = False
        self.own_limits = OwnLimits(config.limits_hold_s, len(self._ladder), self._promise)
        self._rested = Rested(len(self._ladder))
        self._put_off = PutOff()
        self._dwell_s = self.targets.dwell_s
        self._thought_s = float("-inf")
        self._preemptions = 0
        self._queue_limit = QueueLimit(self._predictor, config.shed)
        self._last = Decision(0, "start at full precision")

    @property
    def predictions(self) -> Predictions:
        """Whether predictions are calibrated or learned, and whether they are trusted."""
        if not self._times.is_settled:
            return "learning"
        if self.distrusts:
            return "distrusted"
        if self._reach.why_not:
            return "unkeepable"
        return "calibrated" if isinstance(self._times, CalibratedTimes) else "learned"

    @property
    def max_level(self) -> int:
        """The deepest level that it may take now; 0 once the quality budget is spent."""
        return 0 if self.budget.exhausted else self.targets.max_level

    def take_over(self, last: SloPolicy) -> None:
        """Go on with what another policy has left for limits to hold, and the step times that it has learned, if both
        learn them."""
        self.own_limits.budget.take_over(last.own_limits.budget)
        if isinstance(self._times, LearnedTimes) and isinstance(last._times, LearnedTimes):
            self._times.take_over(last._times)

    def decide(self, signals: Signals) -> Decision:
        """Return the level to serve at now. Cost: levels times cohorts, at most every `_THINK_S`."""
        s = signals
        self._forecast.update(s.now_s, s.num_arrivals, self._served)
        self._charge(s, self.correction.learn(s))
        self._times.watch(s)
        preempted, self._preemptions = s.preemptions > self._preemptions, s.preemptions
        if s.now_s - self._thought_s < _THINK_S and not preempted:
            return self._last
        self._thought_s = s.now_s
        self._bucket.refill(s.now_s)
        self._weigh_trust()
        by_threshold = self._fallback.decide(s)  # always asked, so that its dwell is right when it must take over
        heading = min(s.target_level, len(self._ladder) - 1)
        if self.own_limits.pay(s.now_s):
            self._last = replace(self._last, reason=self.own_limits.why_not)  # said where nothing changes, too
        load = self._load(s, 1.0)
        self._served = self._predictor.lasting_rate(0, load)
        if self._times.is_settled and self._reach.weigh(load):
            self._last = replace(self._last, reason=self._reach.why_not)  # so that it is said where nothing changes
        if s.level != s.target_level:
            self.correction.forget()  # nobody knows how far the way still is
        elif self._times.is_settled and s.waiting and not s.waiting[-1].has_token:
            wait_s = self._predictor.predict(heading, load, self._delay_s(s, heading)).last_wait_s
            self.correction.watch(s.waiting[-1], s.now_s + wait_s)  # trust can come back, too
        if self.budget.exhausted:
            self.own_limits.follow(heading)
            decision = self._spent(s, heading, load)
        elif self.distrusts or self._reach.why_not or not self._times.is_settled:
            self._queue_limit.lift()  # nobody is refused on a prediction that was wrong, or a promise that is
            most = max(heading, quick_end(self._predictor, load, len(self._ladder)) or self.targets.max_level)
            by_threshold = replace(by_threshold, level=min(by_threshold.level, most))
            reasons = (self._reach.why_not, by_threshold.reason)
            decision = self._follow(s, heading, replace(by_threshold, reason="; ".join(filter(None, reasons))))
        else:
            decision = self._think(s, heading, load)
        if decision.max_queued_tokens != self._queue_limit.num_tokens:
            decision = replace(decision, max_queued_tokens=self._queue_limit.num_tokens)
        self._last = decision
        return decision

    # ---- the decision

    def _think(self, s: Signals, heading: int, load: Load) -> Decision:
        own = self.own_limits
        if heading == 0 and self._room.is_calm(load):
            self._queue_limit.lift()
            own.follow(heading)
            self._put_off.forget()
            return self._stay(heading, "nothing to do")
        terms = self._terms(load)
        own.level = min(own.level, heading)
        asked = self._asked(s, heading, load, terms)
        here, best, why_not, has_stricter = asked.here, asked.level, asked.why_not, asked.has_stricter
        is_quick = self._forecast.is_served and s.level == heading and not (own.count and has_stricter)
        dwell_s = self.targets.dwell_s
        self._dwell_s = quick_dwell_s(dwell_s, self._delay_s(s, 0)) if is_quick else dwell_s
        shallower = self._shallower(s, heading, best, asked.usual, asked.is_kept)
        own.level = asked.usual if asked.is_usual_due else own.level
        own.weigh(best if best > heading and not why_not else shallower, has_stricter, s)
        if best > heading:
            if why_not:
                return self._stay(heading, why_not)
            if self._bucket.level < 1.0:
                return self._stay(heading, "too many changes of the level lately")
            what = f"late {here.share:.0%} -> {asked.there.share:.0%} of {here.requests:.0f}"
            why = f"{what}, wait {here.last_wait_s:.1f} s, tpot {here.tpot_s * 1000:.0f} ms"
            return self._go(s, best, "; ".join(filter(None, (why, own.why))))
        if shallower < heading and self._bucket.level >= 2.0:
            why = f"level {shallower} has been predicted to do for {self._dwell_s:.3g} s"
            return self._go(s, shallower, "; ".join(filter(None, (why, own.why_not if has_stricter else ""))))
        return self._stay(heading, f"late {here.share:.0%}")

    def _asked(self, s: Signals, heading: int, load: Load, terms: Terms) -> _Asked:
        """Predict, and say which level is asked for. Deeper ones are predicted only where they could be."""
        own = self.own_limits
        alone = self._predictor.compare([(heading, self._delay_s(s, heading))], load)
        here = alone.promised[0]
        is_enough = terms.is_enough(heading, here, self.targets.target) and self._queue_limit.stays_open(here)
        if is_enough and own.level == heading and not alone.keeps[0]:
            self._put_off.forget()
            return _Asked(heading, "", heading, False, here, here, [], False)
        compared = self._predictor.compare([(k, self._delay_s(s, k)) for k in range(len(self._ladder))], load)
        predictions = compared.promised if own.count else compared.usual
        self._queue_limit.weigh(predictions, load)
        best, why_not = self._best(s, heading, s.level, predictions, terms, load)
        if best <= heading or why_not:
            self._put_off.forget()
        elif self._can_wait(s, heading, best, compared, terms, load):
            why_not = f"level {best} would do a moment later"
        usual, not_usual = self._best(s, own.level, own.level, compared.usual, terms, load)
        is_due = usual > own.level and not not_usual
        is_kept = kept_by_any(compared.keeps[: heading + 1])
        here, there = predictions[heading], predictions[best]
        return _Asked(best, why_not, usual, is_due, here, there, is_kept, compared.has_stricter)

    def _best(
        self, s: Signals, level: int, at: int, predictions: list[Prediction], terms: Terms, load: Load
    ) -> tuple[int, str]:
        """Return the level to go to from `level`, and why not, if it is deeper and not needed; blocks are of `at`."""
        here = predictions[level]
        if terms.is_enough(level, here, self.targets.target):
            return level, ""
        best = terms.best(predictions, self.targets.target)
        if best <= level or (_is_empty(s) and here.keeps(self.targets.target)):
            return min(best, level), ""
        binds = here.binds and not self._room.waits_elsewhere(load, at)
        if best > terms.quick_end and not binds:
            return best, f"late {here.share:.0%}, but KV does not bind"
        if best > terms.lasting and binds and self._room.lasts(load, level, self._delay_s(s, best)):
            return (terms.lasting, "") if terms.lasting > level else (best, f"level {best} is not needed yet")
        return best, ""

    def _can_wait(self, s: Signals, heading: int, best: int, compared: Comparison, terms: Terms, load: Load) -> bool:
        """Return whether to put a deeper level off for who waits for KV: somebody may end, and nobody needs it."""
        is_settled = s.level == s.target_level == heading == self._last.level
        here = compared.usual[heading]
        late_nats = terms.price * chance_late(here.tpot_s, load.tpot_s, load.step_sigma)  # an answer, whatever it waits
        waits_for_kv = here.binds and not self._room.waits_elsewhere(load, s.level)
        if (
            not (self._forecast.is_served and is_settled and waits_for_kv)
            or terms.lasting > heading
            or late_nats > (self._costs[best] - self._costs[heading]) * load.typical.output_tokens
            or (self.own_limits.count and compared.has_stricter)
            or has_lost(s.waiting, load.promise, load.ttft_s, load.tpot_s, load.moment)
        ):
            return False
        later_s = max(_LATER_S, 2 * s.step_s)  # the next look is a step away
        deeper = range(best, max(best, terms.quick_end) + 1)
        later = self._predictor.compare([(level, self._delay_s(s, level) + later_s) for level in deeper], load).usual
        return self._put_off.may_go_on(terms, (heading, best), compared.usual[best], later, self.targets.target)

    def _spent(self, s: Signals, heading: int, load: Load) -> Decision:
        """Go to level 0 because the quality budget is spent, and refuse new requests there if need be."""
        if self._room.is_calm(load) or self._reach.why_not:
            self._queue_limit.lift()
        else:
            self._queue_limit.weigh([self._predictor.predict(0, load, self._delay_s(s, 0))], load)
        return self._stay(0, "quality budget spent") if heading == 0 else self._go(s, 0, "quality budget spent")

    def _follow(self, s: Signals, heading: int, asked: Decision) -> Decision:
        """Do what the thresholds ask for, within the token bucket."""
        self.own_limits.follow(heading)
        self._rested.forget()
        if asked.level == heading or self._bucket.level < (1.0 if asked.level > heading else 2.0):
            return self._stay(heading, asked.reason)
        return self._go(s, asked.level, asked.reason)

    def _terms(self, load: Load) -> Terms:
        s = load.signals
        # Who is let in at a level holds it to the end of its answer, however near the horizon is.
        answers = s.num_running + s.num_waiting + load.arrival_rate * load.horizon_s / 2
        tokens = answers * load.typical.output_tokens
        end = quick_end(self._predictor, load, len(self._ladder))
        lasts = lasting(self._predictor, load, self._forecast.slow, end)
        if self._forecast.is_burst:
            rate = max(load.arrival_rate, self._forecast.slow)
            lasts = max(lasts, for_burst(self._predictor, load, rate, end))
        return Terms(self.targets.nats_per_saved_request, self._costs, tokens, end, lasts)

    def _shallower(self, s: Signals, heading: int, best: int, usual: int, is_kept: Sequence[bool]) -> int:
        """Return the shallowest level that would do with air, and has throughout the dwell.

        The same is found out of the level that everyone's promise alone would ask for.

        Args:
            s: as they are.
            heading: where the engine is, or is on its way to.
            best: level to go to from there; a deeper one begins the dwell anew.
            usual: likewise by everyone's promise alone.
            is_kept: stricter promises that count. Air is no reason to give one up, and to keep it a moment later.
        """
        own, dwell_s = self.own_limits, self._dwell_s
        if best > heading:
            self._rested.forget()
        if usual > own.level:
            own.rested.forget()
        if heading == 0 or (best > heading and usual > own.level):
            return heading
        load = self._load(s, _SAFETY)
        ways = [*((level, self._delay_s(s, level)) for level in range(heading)), (heading, 0.0)]
        compared = self._predictor.compare(ways, load, is_kept)
        predictions = compared.promised if own.count else compared.usual
        terms = self._terms(load)
        if usual <= own.level:
            does = self._does(s, own.level, compared.usual, terms)
            own.level = own.rested.shallowest(s.now_s, does, self._costs, dwell_s)
        if best > heading:
            return heading
        does = self._does(s, heading, predictions, terms)
        return self._rested.shallowest(s.now_s, does, self._costs, dwell_s)

    def _does(self, s: Signals, heading: int, predictions: list[Prediction], terms: Terms) -> list[bool]:
        """Return whether each level shallower than `heading` would do."""
        # Nobody pays for either, and shares of ever fewer requests would say the same for ever.
        most = inf if _is_empty(s) else terms.total(heading, predictions[heading])

        def does(level: int) -> bool:
            late = not predictions[level].keeps(self.targets.target) or level < terms.lasting
            # In an overload all are late, and a level that computes faster is less.
            return (
                s.used_kv_blocks <= _FILL_AFTER_RESTORE * self._usable[level]
                and terms.total(level, predictions[level]) <= most
                and (not late or level == terms.quick_end)
            )

        return [does(level) for level in range(heading)]

    # ---- parts

    def _load(self, s: Signals, safety: float) -> Load:
        # In a long overload what lasts counts: the rate at which requests end, not the room that a level opens once.
        horizon_s = max(self.targets.horizon_s, min(_HORIZON_PER_WAIT * s.oldest_wait_s, _MAX_HORIZON_S))
        return Load(
            s,
            Typical.of(s, self._limits),
            self._forecast.rate(horizon_s) * safety,
            horizon_s,
            self._config.ttft_s,
            self._config.tpot_s,
            self.correction.sigma * safety,
            self.correction.step_sigma * safety + 0.02,
            self.correction.factor * safety,
            self._promise,
        )

    def _delay_s(self, s: Signals, level: int) -> float:
        """Return how long the way from the committed level takes."""
        layers = self._layers_between[min(s.level, len(self._ladder) - 1)][level]
        move = self._times.move
        own_s = layers * (move.degrade_s if level > s.level else move.restore_s)
        return own_s + layers / LAYERS_PER_STEP * s.step_s

    def _charge(self, s: Signals, step: StepLoad | None) -> None:
        """Charge the last step's tokens at their level's cost; those of a transition at the deeper one's."""
        if step is not None:
            self._spend(s.now_s, step.num_seqs, step.level)
        elif s.last_step is None and s.num_running > 0:
            self._spend(s.now_s, s.num_running, max(s.level, s.target_level))

    def _spend(self, now_s: float, num_tokens: int, level: int) -> None:
        self.budget.update(now_s, num_tokens, self._costs[min(level, len(self._costs) - 1)])

    def _weigh_trust(self) -> None:
        sigma = max(self.correction.sigma, self.correction.step_sigma)
        self.distrusts = sigma > (_TRUST_AGAIN if self.distrusts else _LOST_TRUST)

    def _go(self, s: Signals, level: int, reason: str) -> Decision:
        if self._last.level != level:
            self._bucket.take()
            self.correction.forget()
            if level > s.target_level:
                self._rested.forget()
            return Decision(level, reason)
        return self._last

    def _stay(self, heading: int, reason: str) -> Decision:
        # The figures of an unchanged decision move; a new object each time would be a new log line.
        return self._last if self._last.level == heading else Decision(heading, reason)


def _is_empty(s: Signals) -> bool:
    """Return whether nobody is here."""
    return not s.num_running and not s.num_waiting
