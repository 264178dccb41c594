"""What an operator orders: one thing at a time, for so long, and only by who knows what is in force.

    none --pin, max, restore, pause, drain--> in force --resume, its time is over, or level 0 is restored--> none

An order becomes a part of the signals (`policies/orders.py`), so it goes the way that decisions go: controller, plan,
every rank. Each order, and each end of one, is a new revision, which the next order must name: who has not seen what is
in force changes nothing, and a request that is sent again is refused.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from morphserve.control.health import Counters
from morphserve.errors import OrderError
from policies import Ladder, Order, OrderKind, resolve_level

logger = logging.getLogger(__name__)

_LONGEST_S = 86_400.0
_RESTORE_S = 60.0  # after which a restore that finds no room is given up
_ONE_LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"  # as it stands in the log
_MAX_FIRST = 2**48  # drawn; of 32 replicas the sum is a number that all JSON readers know exactly
_MAX_WORDS = 300  # characters of an answer about what somebody has sent

Action = Literal["pin", "max", "restore", "pause", "resume", "drain", "reload"]
Seconds = Annotated[float, Field(gt=0, le=_LONGEST_S)]


class OrderBody(BaseModel):
    """What every order says."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    revision: Annotated[int, Field(strict=True)]  # that whoever orders has seen
    cause: Annotated[str, StringConstraints(max_length=200, pattern=_ONE_LINE)] = ""


class _ForSoLong(OrderBody):
    for_s: Seconds | None = None


class _Level(OrderBody):
    level: Annotated[int, Field(ge=0, strict=True)] | Annotated[str, StringConstraints(max_length=40)]
    for_s: Seconds


class _Restore(OrderBody):
    for_s: Seconds = _RESTORE_S


class ReloadBody(OrderBody):
    """A policy beside it, where the settings are in no file."""

    policy: dict[str, Any] | None = None


_BODIES: dict[Action, type[OrderBody]] = {
    "pin": _Level, "max": _Level, "restore": _Restore, "pause": _ForSoLong, "resume": OrderBody, "drain": _ForSoLong,
    "reload": ReloadBody,
}  # fmt: skip
ORDERS = tuple(_BODIES)


def parse_order(action: Action, text: str | bytes) -> OrderBody:
    """Check the body of an order, JSON.

    Raises:
        OrderError: in one line, whatever the text is.
    """
    try:
        return _BODIES[action].model_validate_json(text)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        keys = ", ".join(_BODIES[action].model_fields)
        why = f"{action}: {where}: {first['msg']}. It takes {keys}"
    raise OrderError("refused", " ".join(why.split())[:_MAX_WORDS])


@dataclass(frozen=True, slots=True)
class _InForce:
    """An order, since when, until when, and why."""

    order: Order
    cause: str
    taken_s: float  # monotonic
    until_s: float | None  # None = until the next order


class OrderBook:
    """The order in force, and the revision that the next one must name. The engine's thread alone changes it."""

    def __init__(self, ladder: Ladder, counters: Counters, clock: Callable[[], float]) -> None:
        """Start without an order, at a revision that no server before has had, whatever the clock says."""
        self._ladder = ladder
        self._counters = counters
        self._clock = clock
        self._first = secrets.randbelow(_MAX_FIRST)
        self._number = 0  # of orders and ends of orders so far
        self._in_force: _InForce | None = None
        self._is_news = False  # no tick has seen it

    @property
    def revision(self) -> int:
        """What the next order must name."""
        return self._first + self._number

    @property
    def kind(self) -> OrderKind | None:
        """Of the order in force."""
        return None if self._in_force is None else self._in_force.order.kind

    @property
    def has_news(self) -> bool:
        """Whether a tick would find something else than the last one did. Any thread may ask."""
        held = self._in_force
        return self._is_news or (held is not None and held.until_s is not None and self._clock() >= held.until_s)

    @property
    def closes_door(self) -> bool:
        """Whether the order in force refuses new requests."""
        return self._in_force is not None and self._in_force.order.closes_door

    def at(self, now_s: float, is_restored: bool) -> Order | None:
        """Return the order in force at a tick. A restore ends with level 0."""
        self._is_news = False
        held = self._in_force
        if held is None:
            return None
        if held.until_s is not None and now_s >= held.until_s:
            self._end("expired")
        elif held.order.kind == "restore" and is_restored:
            self._end("reached")
        return self._in_force.order if self._in_force is not None else None

    def check(self, action: Action, body: OrderBody, revision: int, max_level: int) -> int:
        """Return the level that an order names, 0 if none.

        Args:
            action: what.
            body: of the request.
            revision: that it names of this engine.
            max_level: the deepest level that the policy's bounds allow.

        Raises:
            OrderError: the revision has passed, or the level is beyond what there is or what is allowed.
        """
        if revision != self.revision:
            raise OrderError("stale", f"revision {revision} has passed, {self.revision} is in force. Look, then order")
        if not isinstance(body, _Level):
            return 0
        try:
            level = resolve_level(self._ladder, body.level)
        except ValueError as e:
            raise OrderError("refused", f"{action}: {e}") from e
        if action == "pin" and level > max_level:
            raise OrderError(
                "refused",
                f"pin: level {level} is beyond level {max_level}, the deepest that the policy's max_level and quality "
                "budget allow now. Name a shallower one, or change the policy",
            )
        return level

    def take(self, action: Action, body: OrderBody, level: int) -> None:
        """Put an order in force that `check` has let pass, in the place of the one before; `level` is what to keep."""
        self._number += 1
        self._is_news = True
        self._counters.count_order(action, "taken")
        for_s = getattr(body, "for_s", None)
        said = f"order {self._number}: {action}" + (f" level {level}" if isinstance(body, _Level) else "")
        until = "" if for_s is None else f", for {for_s:g} s"
        logger.info("morph: %s%s (%s)", said, until, body.cause or "no cause given")
        if action in ("resume", "reload"):
            self._in_force = None if action == "resume" else self._in_force
            return
        now_s = self._clock()
        until_s = None if for_s is None else now_s + for_s
        self._in_force = _InForce(Order(cast(OrderKind, action), level, said), body.cause, now_s, until_s)

    def _end(self, how: str) -> None:
        assert self._in_force is not None
        order = self._in_force.order
        self._in_force = None
        self._number += 1
        self._counters.count_order(order.kind, how)
        logger.info("morph: %s has ended: %s; the policy decides", order.reason, how)

    def as_json(self) -> dict[str, Any]:
        """Return what is in force."""
        held, now_s = self._in_force, self._clock()
        order = None
        if held is not None:
            left_s = None if held.until_s is None else max(held.until_s - now_s, 0.0)
            order = {
                "kind": held.order.kind,
                "level": held.order.level,
                "cause": held.cause,
                "since_s": now_s - held.taken_s,
                "left_s": left_s,
            }
        return {"revision": self.revision, "order": order}
