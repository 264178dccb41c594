"""Requests that ask not to be served below a level, at the door: whose they are, and which of them are refused.

The engine decides both, and knows neither API keys nor which of its names a client has called its model by. So the API
server marks such a request with the two, and refuses it before its answer begins, by what the engine said at the last
poll: half a second ago at most.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from hashlib import sha256
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError

from morphserve.integration.server.scrape import Refusals
from policies import Floors, MorphLevel

logger = logging.getLogger("vllm.morphserve")

MAX_LEVEL_ARG, KEY_ARG, MODEL_ARG = "morphserve_max_level", "morphserve_key", "morphserve_model"
RETRY_AFTER_S = 5  # the load may ask for less long before an hour's seconds are back
_KEY_DIGITS = 16  # of its SHA-256, as `policy.floors.keys` has them

Message = MutableMapping[str, Any]


class Sender:
    """What HTTP says of who has sent a request."""

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Know the headers; the body only if `listen` hears it, and only until the model is known or needs not be."""
        self._headers = headers
        self._body: list[bytes] = []
        self._model: str | None = None
        self.retry_after_s: int | None = None  # it was refused

    def listen(self, receive: Callable[[], Awaitable[Message]]) -> Callable[[], Awaitable[Message]]:
        """Return `receive`, overheard."""

        async def overheard() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self._body.append(message.get("body", b""))
            return message

        return overheard

    @property
    def key(self) -> str | None:
        """The digest of the API key that was shown; None = none."""
        shown = next((value for name, value in self._headers if name == b"authorization"), b"")
        scheme, _, key = shown.partition(b" ")
        return sha256(key).hexdigest()[:_KEY_DIGITS] if scheme.lower() == b"bearer" and key else None

    @property
    def model(self) -> str | None:
        """What was named as the model; None = nothing, or nobody has listened."""
        if self._body:
            try:
                body = json.loads(b"".join(self._body))
            except (ValueError, RecursionError):
                body = None
            name = body.get("model") if isinstance(body, dict) else None
            self._model = name if isinstance(name, str) else None
            self.forget_body()
        return self._model

    def forget_body(self) -> None:
        """Hold on to the body no longer: it may be large, and its answer long in coming."""
        self._body = []


class FloorDoor:
    """Marks and refuses. While engines are silent it refuses nobody."""

    def __init__(self, refusals: Refusals) -> None:
        """Refuse nobody; listen for names of models until the engines say that they make no difference.

        Args:
            refusals: where those are counted that it refuses.
        """
        self._refusals = refusals
        self.heeds_models = True
        self._min_floor = 0
        self._floors: Floors | None = None  # known while some are refused

    def hear(self, statuses: Sequence[dict[str, Any]]) -> None:
        """Take from the engines' statuses what is the door's alone, digests of keys among it; none = they are silent.

        Nobody knows which engine a request will go to, so all must refuse.
        """
        said = [status.pop("floors", None) or {"min_floor": 0, "heeds_models": False} for status in statuses]
        if said:
            self.heeds_models = any(floors["heeds_models"] for floors in said)
        min_floor = min((floors["min_floor"] for floors in said), default=0)
        self._floors = Floors.from_json(said[0]["levels"], _ladder_of(statuses[0])) if min_floor else None
        if bool(min_floor) != bool(self._min_floor):
            if min_floor:
                logger.warning("morph: new requests that may not be served at level %d get a 503", min_floor)
            else:
                logger.info("morph: new requests that ask not to be served below a level are taken again")
        self._min_floor = min_floor

    def admit(self, asked: dict[str, Any], sender: Sender, adapter: str | None) -> None:
        """Mark a request that asks for a level with whose it is.

        Raises:
            GracefulHTTPError: it would wait, and the operator has such requests refused.
        """
        key, model = sender.key, sender.model
        asked.update({name: mark for name, mark in ((KEY_ARG, key), (MODEL_ARG, model)) if mark is not None})
        if self._floors is None:
            return
        try:
            own = self._floors.level_of(asked[MAX_LEVEL_ARG], adapter or model, key)
        except ValueError:  # no level: the engine says so, and serves it as any other
            return
        if own is not None and own < self._min_floor:
            sender.retry_after_s = RETRY_AFTER_S
            self._refusals.count("floor")
            raise GracefulHTTPError(
                f"{MAX_LEVEL_ARG}: this request may not be served below level {own}, the load asks for level "
                f"{self._min_floor}, and the time is spent for which such requests may hold others up "
                "(policy.floors.hold_s). Send it again later, or without it.",
                HTTPStatus.SERVICE_UNAVAILABLE,
            )


def forget_marks(asked: dict[str, Any]) -> None:
    """Drop what clients may have written in our place."""
    for name in (KEY_ARG, MODEL_ARG):
        asked.pop(name, None)


def _ladder_of(status: dict[str, Any]) -> tuple[MorphLevel, ...]:
    """Return a ladder of the same levels as far as their names go: which formats, not which layers have them."""
    return tuple(
        MorphLevel(
            row["level"],
            tuple(fmt for fmt, count in row["layers_by_format"].items() for _ in range(count)),
            row["weight_bytes"],
            row["num_kv_blocks"],
        )
        for row in status["ladder"]
    )
