"""Limits of requests that are stricter than everyone's, and for how long they may hold everyone at a deeper level."""

from __future__ import annotations

from policies.hold_budget import HoldBudget
from policies.promise import Promise
from policies.slo.rested import Rested
from policies.types import Signals


class OwnLimits:
    """Beside the level that is asked for, the one that everyone's promise alone would have asked for.

    1. Time is paid for in which the first is deeper for such a limit, also after its request has ended, until nothing
       but the way back is to come. What an operator's order pins is not, nor while nobody else is here.
    2. Once an hour's seconds are spent such limits count as everyone's, until a tenth is back.
    """

    def __init__(self, hold_s_per_hour: float, num_levels: int, promise: Promise) -> None:
        """Be at level 0. `promise`: everyone's."""
        self.budget = HoldBudget(hold_s_per_hour)
        self.rested = Rested(num_levels)  # as everyone's promise alone would have it
        self.level = 0  # likewise
        self._hold = False
        self._promise = promise
        self._pays = False

    @property
    def count(self) -> bool:
        """Whether they do."""
        return not self.budget.is_spent

    @property
    def why(self) -> str:
        """What is to be said of a deeper level that they hold; "" = they hold none."""
        budget = self.budget
        left = f"{budget.left_s:.0f} s of {budget.per_hour_s:g} an hour are left"
        return f"for requests with limits stricter than everyone's, {left}" if self._hold else ""

    @property
    def why_not(self) -> str:
        """What is to be said of a shallower level where they do not count; "" = they do."""
        held = f"held others for their {self.budget.per_hour_s:g} s an hour"
        return "" if self.count else f"limits stricter than everyone's have {held}, and count as everyone's"

    def pay(self, now_s: float) -> bool:
        """Pay for the time since the last call; return whether it was the last that there was."""
        did_count = self.count
        self.budget.pay(now_s, self._pays)
        return did_count and not self.count

    def follow(self, level: int) -> None:
        """Take a level for the one that everyone's promise asks for: nothing is known of another."""
        self.level, self._hold, self._pays = level, False, False
        self.rested.forget()

    def weigh(self, asked: int, are_here: bool, s: Signals) -> None:
        """Say whether they hold a deeper level from now on.

        Args:
            asked: the level that is asked for now.
            are_here: such a limit is, and some level keeps it.
            s: as they are.
        """
        is_pinned = s.order is not None and s.order.is_exact
        self._hold = asked > self.level and not is_pinned and self.count and (are_here or self._hold)
        self._pays = self._hold and not self._are_alone(s)

    def _are_alone(self, s: Signals) -> bool:
        """Return whether all that run and wait have such a limit, or nobody does: then they hold up none but theirs."""
        promise = self._promise
        running = sum(own.num_requests for own in s.running_limits if self._is_strict_tpot(own.limit_s))
        waiting = 0
        for cohort in s.waiting:
            own_s = promise.own_ttft_s(cohort.ttft_s)
            is_strict = own_s is not None and promise.ttft_s is not None and own_s < promise.ttft_s
            if self._is_strict_tpot(cohort.tpot_s) if cohort.has_token else is_strict:
                waiting += cohort.num_requests
        return running >= s.num_running and waiting >= s.num_waiting

    def _is_strict_tpot(self, asked_s: float | None) -> bool:
        own_s, usual_s = self._promise.own_tpot_s(asked_s), self._promise.tpot_s
        return own_s is not None and usual_s is not None and own_s < usual_s
