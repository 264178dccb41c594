"""`GET /morphserve/status`, from the last poll: whoever asks, and however often, no engine is asked for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

from morphserve.integration.server.access import Access

Status = dict[str, Any]
_IN_THE_LOG = "the server's log says it"


class LastStatuses:
    """What the engines said at the last poll. Documents made of it are written once a poll, not once a question."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked_s = 0.0
        self._written: dict[Any, bytes] = {}
        self.statuses: list[Status] = []

    def put(self, statuses: list[Status], asked_s: float) -> None:
        """Take the answers to a question that was asked at `asked_s`; none = no engine answers."""
        self.statuses, self._asked_s, self._written = statuses, asked_s, {}

    @property
    def age_s(self) -> float:
        """Seconds since the question: what the answers say is no older."""
        return max(self._clock() - self._asked_s, 0.0)

    def of(self, engine: int | None) -> list[Status]:
        """Return the status of one engine, or of all.

        Raises:
            HTTPException: there is none.
        """
        if not self.statuses:
            raise HTTPException(503, "no engine has told its status; it starts, is gone, or runs without MorphServe")
        found = [status for status in self.statuses if engine in (None, status["engine"])]
        if not found:
            raise HTTPException(404, f"no engine {engine} behind this API server")
        return found

    def document(self, key: Any, make: Callable[[], Status]) -> Response:
        """Return the JSON that `make` gives, with the age; made once for each `key` and poll."""
        if key not in self._written:
            self._written[key] = json.dumps(make(), separators=(",", ":"), allow_nan=False).encode()
        rest = self._written[key]
        return Response(b'{"age_s":%.3f,' % self.age_s + rest[1:], media_type="application/json")


def add_status(router: APIRouter, last: LastStatuses, access: Callable[[], Access]) -> None:
    """Add `GET /status`."""

    @router.get("/status")
    async def status(request: Request, engine: int | None = None) -> Response:
        """Level, capacity, ladder and counters of an engine, as they were `age_s` seconds ago at most.

        Of several engines (data parallel) `engine` names one; without it they are all under `engines`.
        """
        is_trusted = access().check_read(request)
        found = last.of(engine)
        return last.document(("status", engine, is_trusted), lambda: _whole([shown(s, is_trusted) for s in found]))


def shown(status: Status, is_trusted: bool) -> Status:
    """Return a status; for those without a token without what files and their names say."""
    if is_trusted:
        return status
    policy = status["policy"]
    changes = [{**row, "error": row["error"] and _IN_THE_LOG} for row in status["recent_transitions"]]
    hidden = {"source": PurePath(policy["source"]).name, "last_error": policy["last_error"] and _IN_THE_LOG}
    orders = status["orders"]
    order = orders["order"] and {key: value for key, value in orders["order"].items() if key != "cause"}
    shown_parts = {"policy": {**policy, **hidden}, "recent_transitions": changes, "orders": {**orders, "order": order}}
    return {**status, **shown_parts}


def _whole(statuses: list[Status]) -> Status:
    return statuses[0] if len(statuses) == 1 else {"engines": statuses}
