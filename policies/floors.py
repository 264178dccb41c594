"""Requests that may not be served below a level of their own: who may ask for it, and how long they hold others up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from policies.config import FloorsConfig
from policies.hold_budget import HoldBudget
from policies.levels import resolve_level
from policies.types import Decision, Ladder, Order, Policy, Predictions, Signals


@dataclass(frozen=True, slots=True)
class Floors:
    """What requests may ask for on one ladder."""

    ladder: Ladder
    shallowest: int | None  # that anybody may ask for; None = nobody may
    by_model: dict[str, int]  # what a client names as its model
    by_key: dict[str, int]

    @classmethod
    def of(cls, section: FloorsConfig, ladder: Ladder) -> Floors:
        """Resolve a section's levels.

        Raises:
            ValueError: the ladder has no such level.
        """
        shallowest = None if section.shallowest is None else resolve_level(ladder, section.shallowest)
        by_model, by_key = (
            {name: resolve_level(ladder, level) for name, level in levels.items()}
            for levels in (section.models, section.keys)
        )
        return cls(ladder, shallowest, by_model, by_key)

    @property
    def are_allowed(self) -> bool:
        """Whether anybody may ask."""
        return self.shallowest is not None or bool(self.by_model or self.by_key)

    def level_of(self, asked: object, model: str | None = None, key: str | None = None) -> int | None:
        """Return the deepest level that a request may run at; None = any.

        Args:
            asked: what it has asked for, a level's index or name.
            model: as its client has named it; None if nobody knows.
            key: of its client, as the section names it; None if nobody knows.

        Raises:
            ValueError: there is no such level.
        """
        cap = self.shallowest if model is None else self.by_model.get(model, self.shallowest)
        cap = cap if key is None else self.by_key.get(key, cap)
        if asked is None or cap is None:
            return None
        level = max(resolve_level(self.ladder, _spec(asked)), cap)
        return level if level < len(self.ladder) - 1 else None

    def as_json(self) -> dict[str, Any]:
        """Return who may ask for which level, as plain values."""
        return {"shallowest": self.shallowest, "models": self.by_model, "keys": self.by_key}

    @classmethod
    def from_json(cls, values: dict[str, Any], ladder: Ladder) -> Floors:
        """Return what `as_json` has told of."""
        return cls(ladder, values["shallowest"], values["models"], values["keys"])


def _spec(asked: object) -> int | str:
    if isinstance(asked, str):
        return int(asked) if asked.isdigit() and len(asked) < 5 else asked
    if isinstance(asked, int | float) and not isinstance(asked, bool) and asked == asked // 1:
        return int(asked)
    raise ValueError(f"{asked!r:.40} is no level")


def _is_ordered(order: Order | None, level: int | None) -> bool:
    """Return whether an operator holds the level, whoever is here."""
    return order is not None and (order.is_exact or level is None or order.level <= level)


class FloorPolicy:
    """Another policy, held at the level that the requests which are here may not be served below.

    1. While one is here, and seconds are left, no deeper level is asked for than the shallowest of theirs.
    2. Only time in which the other policy wants a deeper level for somebody else, and no order forbids it, is paid for.
       Once all of an hour's is spent, that one decides, and they wait, until a tenth is back or nobody else is here.
    3. Where they are not to wait, new ones that would are refused meanwhile.
    """

    def __init__(self, inner: Policy, hold_s_per_hour: float, refuses: bool = False) -> None:
        """Ask `inner` from now on. `refuses`: new ones rather than let them wait."""
        self.inner = inner
        self.budget = HoldBudget(hold_s_per_hour)
        self._refuses = refuses
        self._held = False  # since the last question, others too
        self._last = Decision(0, "")

    @property
    def max_level(self) -> int:
        """The other policy's: an operator's order goes as deep as that, and who may not be served there waits."""
        return self.inner.max_level

    @property
    def predictions(self) -> Predictions | None:
        """The other policy's."""
        return self.inner.predictions

    def decide(self, signals: Signals) -> Decision:
        """Return the level to serve at now."""
        s = signals
        wanted = self.inner.decide(s)
        self.budget.pay(s.now_s, self._held)
        is_held = wanted.level > (wanted.level if s.max_level is None else s.max_level)
        is_held = is_held and (s.max_level_alone or not self.budget.is_spent)
        self._held = is_held and not s.max_level_alone and not _is_ordered(s.order, s.max_level)
        if not is_held or s.max_level is None:
            decision = wanted
        else:
            why = f"held at level {s.max_level} for requests that ask for it; else level {wanted.level}"
            decision = replace(wanted, level=s.max_level, reason=why, is_final=False)  # they end
        if self._refuses and self.budget.is_spent and not s.max_level_alone and wanted.level > 0:
            decision = replace(decision, min_floor=wanted.level, is_final=False)  # until the others have ended
        # The same object while nothing changes: a new one each time would be a new log line.
        self._last = self._last if self._last == decision else decision
        return self._last
