"""The policy in office: asked at every step, under an operator's order, replaced between two, its answers logged."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from morphserve.control.decisions.decision_log import DecisionLog
from morphserve.control.decisions.orders import Action, OrderBook, parse_order
from morphserve.control.health import Counters
from morphserve.errors import OrderError
from policies import Decision, Ladder, OrderKind, Policy, PolicySetup, Predictions, Signals, ask, hold_budgets, succeed

logger = logging.getLogger(__name__)

_MEANS: dict[Predictions, str] = {
    "calibrated": "step times as measured by calibration decide",
    "learning": "too few steps have been seen as yet, thresholds decide",
    "learned": "step times as learned from this engine's own steps decide",
    "distrusted": "they have been wrong of late, thresholds decide until they are right again",
    "unkeepable": "of no use, as no level keeps the policy's promise even for a lone request; thresholds decide",
}


@dataclass(frozen=True, slots=True)
class _Replacement:
    """A policy that is to be asked from the next tick on."""

    policy: Policy
    note: str
    setup: PolicySetup


class PolicyHost:
    """The policy that is asked for the level, and its newest answer."""

    def __init__(
        self, policy: Policy, ladder: Ladder, counters: Counters, log: DecisionLog | None, clock: Callable[[], float]
    ) -> None:
        """Ask nothing yet.

        Args:
            policy: asked once per tick.
            ladder: an answer must be one of its levels.
            counters: told of orders, and when the log fails.
            log: where answers are recorded; None = nowhere.
            clock: monotonic seconds, the one of the signals.
        """
        self.decision = Decision(0, "start at full precision")
        self.kind = ""  # of the policy that is asked
        self._policy = policy
        self._num_levels = len(ladder)
        self._counters = counters
        self._orders = OrderBook(ladder, counters, clock)
        self._log = log
        self._predictions: Predictions | None = None  # last said
        self._has_warned = False  # of this policy's promise
        self._next: deque[_Replacement] = deque(maxlen=1)  # put in by any thread, taken by the next tick

    @property
    def has_news(self) -> bool:
        """Whether another policy waits for the next tick, or an order, or the end of one."""
        return bool(self._next) or self._orders.has_news

    @property
    def max_queued_tokens(self) -> int | None:
        """Requests beyond so many waiting prompt tokens are to be refused at the door; None = none are."""
        return 0 if self._orders.closes_door else self.decision.max_queued_tokens

    @property
    def order_kind(self) -> OrderKind | None:
        """What of an operator is in force; None = nothing is."""
        return self._orders.kind

    def orders_as_json(self) -> dict[str, Any]:
        """Return what an operator has ordered, and what he may."""
        return {**self._orders.as_json(), "max_level": self._policy.max_level}

    @property
    def predictions(self) -> Predictions | None:
        """What the policy's predictions are made of; None = it makes none."""
        return self._policy.predictions

    def holds_as_json(self) -> dict[str, Any]:
        """Return for how long requests may still decide the level of all, by what they bring."""
        return {name: budget.as_json() for name, budget in hold_budgets(self._policy).items()}

    def replace(self, policy: Policy, note: str, setup: PolicySetup) -> None:
        """Ask `policy` from the next tick on. Any thread may call; of two before one tick the later counts.

        Args:
            policy: that has been asked nothing yet.
            note: why, in words, for the log.
            setup: what it was made of, for the decision log.
        """
        self._next.append(_Replacement(policy, note, setup))

    def order(
        self, action: Action, text: str, revision: int, target_level: int, is_rehearsal: bool, refusal: str = ""
    ) -> None:
        """Put an operator's order in force from the next tick on.

        Args:
            action: what.
            text: the order's body, JSON.
            revision: of this host, that whoever orders has seen.
            target_level: where the engine is, or is on its way to.
            is_rehearsal: only say whether it would be taken.
            refusal: why what it orders was refused already; "" = it was not.

        Raises:
            OrderError: it is not.
        """
        try:
            body = parse_order(action, text)
            if refusal:
                raise OrderError("refused", f"{action}: {refusal}")
            level = self._orders.check(action, body, revision, self._policy.max_level)
        except OrderError as e:
            self._counters.count_order(action, "refused")
            logger.info("morph: an order is refused: %s", e)
            raise
        if not is_rehearsal:
            self._orders.take(action, body, target_level if action == "pause" else level)

    def consult(self, signals: Signals, is_restored: bool = False) -> None:
        """Ask the policy, or its successor if there is one; `decision` is its answer, under the order in force.

        Args:
            signals: as the monitor made them.
            is_restored: nothing of the engine is above level 0, or on its way there.

        Raises:
            ValueError: the policy wants a level that there is not; or whatever the policy raises.
        """
        if self._next:
            self._hand_over(signals.level)
        if (order := self._orders.at(signals.now_s, is_restored)) is not None:
            signals = replace(signals, order=order)
        decision = ask(self._policy, signals)
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
        if predictions == "unkeepable" and not self._has_warned:
            self._has_warned = True
            logger.warning("morph: %s. Raise policy.ttft_s or policy.tpot_s", self.decision.reason)
        if predictions == self._predictions:
            return
        self._predictions = predictions
        if predictions is not None:
            logger.info("morph: predictions are %s: %s", predictions, _MEANS[predictions])

    def _hand_over(self, level: int) -> None:
        new = self._next.popleft()
        succeed(new.policy, self._policy)
        self._policy, self.kind = new.policy, new.setup.section.kind
        self._has_warned = False
        logger.info("morph: another policy at level %d (%s)", level, new.note)
        if self._log is not None:
            self._log.policy_changed(new.note, new.setup)
