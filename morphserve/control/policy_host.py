"""The policy in office: asked at every step, replaced between two, its answers logged."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

from morphserve.control.decision_log import DecisionLog
from morphserve.control.health import Counters
from policies import Decision, Policy, PolicySetup, Predictions, Signals, succeed

logger = logging.getLogger(__name__)

_MEANS: dict[Predictions, str] = {
    "calibrated": "step times as measured by calibration decide",
    "learning": "too few steps have been seen as yet, thresholds decide",
    "learned": "step times as learned from this engine's own steps decide",
    "distrusted": "they have been wrong of late, thresholds decide until they are right again",
}


@dataclass(frozen=True, slots=True)
class _Replacement:
    """A policy that is to be asked from the next tick on."""

    policy: Policy
    note: str
    setup: PolicySetup


class PolicyHost:
    """The policy that is asked for the level, and its newest answer."""

    def __init__(self, policy: Policy, num_levels: int, counters: Counters, log: DecisionLog | None) -> None:
        """Ask nothing yet.

        Args:
            policy: asked once per tick.
            num_levels: of the ladder; an answer must be one of them.
            counters: told when the log fails.
            log: where answers are recorded; None = nowhere.
        """
        self.decision = Decision(0, "start at full precision")
        self._policy = policy
        self._num_levels = num_levels
        self._counters = counters
        self._log = log
        self._predictions: Predictions | None = None  # last said
        self._next: deque[_Replacement] = deque(maxlen=1)  # put in by any thread, taken by the next tick

    @property
    def has_successor(self) -> bool:
        """Whether another policy waits for the next tick."""
        return bool(self._next)

    @property
    def predictions(self) -> Predictions | None:
        """What the policy's predictions are made of; None = it makes none."""
        return self._policy.predictions

    def replace(self, policy: Policy, note: str, setup: PolicySetup) -> None:
        """Ask `policy` from the next tick on. Any thread may call; of two before one tick the later counts.

        Args:
            policy: that has been asked nothing yet.
            note: why, in words, for the log.
            setup: what it was made of, for the decision log.
        """
        self._next.append(_Replacement(policy, note, setup))

    def consult(self, signals: Signals) -> None:
        """Ask the policy, or its successor if there is one; `decision` is its answer.

        Raises:
            ValueError: the policy wants a level that there is not; or whatever the policy raises.
        """
        if self._next:
            self._hand_over(signals.level)
        decision = self._policy.decide(signals)
        if not 0 <= decision.level < self._num_levels:
            raise ValueError(
                f"policy wants level {decision.level} ({decision.reason}), the ladder has 0 to {self._num_levels - 1}"
            )
        self.decision = decision
        self._note_predictions()
        if self._log is not None:
            try:
                self._log.record(signals, decision)
                self._counters.decisions_dropped = self._log.num_dropped
            except Exception:
                self._counters.count_error("decision_log")
                logger.warning("morph: decision log failed, no further decisions are written", exc_info=True)
                self._log = None

    def _note_predictions(self) -> None:
        predictions = self._policy.predictions
        if predictions == self._predictions:
            return
        self._predictions = predictions
        if predictions is not None:
            logger.info("morph: predictions are %s: %s", predictions, _MEANS[predictions])

    def _hand_over(self, level: int) -> None:
        new = self._next.popleft()
        succeed(new.policy, self._policy)
        self._policy = new.policy
        logger.info("morph: another policy at level %d (%s)", level, new.note)
        if self._log is not None:
            self._log.policy_changed(new.note, new.setup)
