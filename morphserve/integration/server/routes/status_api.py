"""`GET /morphserve/status`, from the last poll: whoever asks, and however often, no engine is asked for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

from morphserve.integration.server.poll import StatusPoll
from morphserve.integration.server.routes.access import Access

Status = dict[str, Any]
_OLD_S = 2.0  # four polls
_MAX_WRITTEN = 64
_IN_THE_LOG = "the server's log says it"


class LastStatuses:
    """What the engines said last, as documents: written once an answer, not once a question."""

    def __init__(self, poll: StatusPoll) -> None:
        self._poll = poll
        self._statuses: list[Status] = []  # that the documents are of
        self._written: dict[Any, bytes] = {}

    def of(self, engine: int | None) -> list[Status]:
        """Return the status of one engine, or of all.

        Raises:
            HTTPException: there is none.
        """
        statuses = self._poll.last
        if not statuses:
            raise HTTPException(503, "no engine has told its status; it starts, or runs without MorphServe")
        found = [status for status in statuses if engine in (None, status["engine"])]
        if not found:
            raise HTTPException(404, f"no engine {engine} behind this API server")
        return found

    def document(self, key: Any, make: Callable[[float], Status]) -> Response:
        """Return the JSON that `make` gives of the figures' age, and that; made once for each `key` and answer.

        Old figures are made anew each second, so that words which say their age follow it.
        """
        if self._statuses is not self._poll.last:
            self._statuses, self._written = self._poll.last, {}
        age_s = self._poll.age_s
        if age_s >= _OLD_S:
            key = (key, int(age_s))
        if key not in self._written:
            if len(self._written) >= _MAX_WRITTEN:
                self._written.clear()
            self._written[key] = json.dumps(make(age_s), separators=(",", ":"), allow_nan=False).encode()
        return Response(b'{"age_s":%.3f,' % age_s + self._written[key][1:], media_type="application/json")


def add_status(router: APIRouter, last: LastStatuses, access: Callable[[], Access]) -> None:
    """Add `GET /status`."""

    @router.get("/status")
    async def status(request: Request, engine: int | None = None) -> Response:
        """Level, capacity, ladder and counters of an engine, as they were `age_s` seconds ago at most.

        Of several engines (data parallel) `engine` names one; without it they are all under `engines`.
        """
        is_trusted = access().check_read(request)
        found = last.of(engine)
        return last.document(("status", engine, is_trusted), lambda _: _whole([shown(s, is_trusted) for s in found]))


def shown(status: Status, is_trusted: bool) -> Status:
    """Return a status; for those without a token without what files and their names say."""
    if is_trusted:
        return status
    policy = status["policy"]
    changes = [{**row, "error": row["error"] and _IN_THE_LOG} for row in status["recent_transitions"]]
    hidden = {"source": PurePath(policy["source"]).name, "last_error": policy["last_error"] and _IN_THE_LOG}
    orders = status["orders"]
    order = orders["order"] and {key: value for key, value in orders["order"].items() if key != "cause"}
    parts = {"policy": {**policy, **hidden}, "recent_transitions": changes, "orders": {**orders, "order": order}}
    if prepare := status.get("prepare"):
        parts["prepare"] = {**prepare, "note": prepare["note"] and _IN_THE_LOG}
    return {**status, **parts}


def _whole(statuses: list[Status]) -> Status:
    return statuses[0] if len(statuses) == 1 else {"engines": statuses}
