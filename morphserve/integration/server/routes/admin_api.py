"""`/morphserve/admin/*`: what an operator may order of all engines behind this API server, and what is in force.

    GET  state                                        with either token: revision, order, level, load, by engine
    POST pin max restore pause resume drain reload    with admin.token_file's; the body names the revision that it saw

One order at a time, of at most 4 KiB of flat JSON, which must come within ten seconds and be taken within ten more. A
passed revision is refused (409), and with it whatever is sent a second time. All engines check an order before one of
them takes it; the first of them takes it before the others, so that of two API servers' orders at once one is refused
everywhere.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol, cast

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from morphserve.control import ORDERS, Action, OrderBody, ReloadBody, parse_order
from morphserve.errors import OrderError
from morphserve.integration.server.routes.access import Access
from morphserve.integration.server.routes.body import alone, answered_within, text_of
from morphserve.integration.server.routes.reload_api import ask_engines
from morphserve.integration.server.routes.status_api import LastStatuses, shown

_MAX_BODY_BYTES = 4096
_TIMEOUT_S = 10.0  # of each question to the engines
_SHOWN = ("engine", "level", "target_level", "exposure_level", "deepest_level", "failed", "num_running", "num_waiting")
_CODES = {"stale": 409, "late": 409, "refused": 422, "busy": 429, "failed": 503}  # by outcome

Status = dict[str, Any]


class Engines(Protocol):
    """All engines behind this API server."""

    def look(self) -> Awaitable[list[Status]]:
        """Ask for the status now, as the poll does."""
        ...

    def call(self, method: str, *args: Any) -> Awaitable[list[Status]]:
        """Call a utility method of each; answers in the order of the engines."""
        ...


def add_admin(router: APIRouter, last: LastStatuses, engines: Engines, access: Callable[[], Access]) -> None:
    """Add the routes."""
    door = asyncio.Lock()

    @router.get("/admin/state")
    async def state(request: Request) -> Response:
        """Return the revision, and what is in force in each engine, as of the last poll."""
        is_trusted = access().check_read(request)
        return last.document(("state", is_trusted), lambda _: state_of(shown(s, is_trusted) for s in last.of(None)))

    @router.post("/admin/{action}")
    async def order(request: Request, action: str) -> JSONResponse:
        """Order something: {ok, error, revision, engines}."""
        access().check_change(request)
        if action not in ORDERS:
            raise HTTPException(404, f"no order of that name; there are {', '.join(ORDERS)}")
        async with alone(door, "order"):
            text = await text_of(request, _MAX_BODY_BYTES)
            try:
                body = parse_order(cast(Action, action), text)
            except OrderError as e:
                raise HTTPException(422, str(e)) from e
            try:
                return await _order(engines, action, text, body)
            except TimeoutError as e:
                raise HTTPException(504, f"{e}; look at the state") from e


async def _order(engines: Engines, action: str, text: str, body: OrderBody) -> JSONResponse:
    """Have all engines check an order, then take it."""
    async with answered_within(_TIMEOUT_S):
        statuses = await engines.look()
    if not statuses:
        raise HTTPException(503, "the engine runs without MorphServe")
    now = state_of(statuses)
    if body.revision != now["revision"]:
        error = f"revision {body.revision} has passed, {now['revision']} is in force. Look at the state, then order"
        return JSONResponse({"ok": False, "error": error, **now}, 409)
    seen = [[status["engine"], status["orders"]["revision"]] for status in statuses]
    refused: Status = {}
    for is_rehearsal, asked in ((True, seen), (False, seen[:1]), (False, seen[1:])):
        if not asked:
            break
        async with answered_within(_TIMEOUT_S):
            # An engine that hangs must not take it when nobody waits for the answer any more.
            not_after_s = time.time() + _TIMEOUT_S
            answers = await engines.call("morphserve_order", action, text, asked, is_rehearsal, not_after_s)
        refused = next((answer for answer in answers if not answer["ok"]), {})
        if action == "reload" and not refused and is_rehearsal:
            refused = await _reload(engines, text, cast(ReloadBody, body), seen, is_rehearsal)
        if refused:
            break
    if action == "reload" and not refused:
        refused = await _reload(engines, text, cast(ReloadBody, body), seen, is_rehearsal=False)
    async with answered_within(_TIMEOUT_S):  # so that what is shown, and the door, follow at once
        now = state_of(await engines.look())
    code = _CODES[refused["outcome"]] if refused else 200
    return JSONResponse({"ok": not refused, "error": refused.get("error"), **now}, code)


async def _reload(
    engines: Engines, text: str, body: ReloadBody, seen: list[list[int]], is_rehearsal: bool
) -> Status:
    """Have all engines read their file, or take a policy that was sent, or say whether they would.

    Returns:
        The answer of one that does not; each of those has counted the order as refused.
    """
    sent = "" if body.policy is None else json.dumps({"policy": body.policy})
    answers = await ask_engines(engines.call, "POST /morphserve/admin/reload", sent, is_rehearsal)
    refused = [answer for answer in answers if not answer["ok"]]
    for answer in refused:
        asked = [revision for revision in seen if revision[0] == answer["engine"]]
        async with answered_within(_TIMEOUT_S):
            not_after_s = time.time() + _TIMEOUT_S
            await engines.call("morphserve_order", "reload", text, asked, False, not_after_s, answer["error"])
    return next(iter(refused), {})


def state_of(statuses: Iterable[Status]) -> Status:
    """Return what an operator must know before an order. The revision of several engines is the sum of theirs."""
    engines = [_engine(status) for status in statuses]
    return {"revision": sum(engine["revision"] for engine in engines), "engines": engines}


def _engine(status: Status) -> Status:
    engine = {**{key: status[key] for key in _SHOWN}, **status["orders"]}
    is_empty = not (status["num_running"] or status["num_waiting"] or status["exposure_level"])
    return {**engine, "drained": is_empty and bool(engine["order"]) and engine["order"]["kind"] == "drain"}
