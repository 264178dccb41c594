"""SIGHUP and `POST /morphserve/reload`: the engines read the policy from their YAML now, not within two seconds.

Engines without a YAML take it from the body of the POST. Who may send one may slow the server down or make it refuse
requests, so where vLLM asks for an API key, a body needs it too.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from hmac import compare_digest
from typing import Any, Protocol
from urllib.parse import urlsplit

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse

from morphserve.integration.start import hangup_is_free

logger = logging.getLogger("vllm.morphserve")


class Ask(Protocol):
    """From the cause, and what was sent, to each engine's answer."""

    def __call__(self, cause: str, sent: str = "") -> Awaitable[list[dict[str, Any]]]: ...


_MAX_BODY_BYTES = 65_536
_NOTHING = ("", "{}")  # what clients send that always send JSON, too
_TIMEOUT_S = 60.0  # an engine answers between two steps, and one of a dead engine never

_tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps none alive


def add_route(router: APIRouter, ask: Ask, keys: Callable[[], Sequence[str]]) -> None:
    """Add `POST /reload`: 200, or 422 when an engine has refused the policy; the answer says why.

    Args:
        router: of /morphserve.
        ask: the engines.
        keys: gives those of which a request with a body must show one; none = it need not.
    """

    @router.post("/reload")
    async def reload(request: Request) -> JSONResponse:
        """Take the `policy:` section from the YAML as it is now, in all engines: {ok, error, policy}.

        A server that was started without a YAML takes it from the body, in JSON or YAML: {"policy": {"kind": ...}}
        """
        sent = await _text_of(request, keys())
        try:
            answers = await asyncio.wait_for(ask("POST /morphserve/reload", sent), _TIMEOUT_S)
        except TimeoutError as e:
            raise HTTPException(504, f"an engine has not answered for {_TIMEOUT_S:.0f} s") from e
        if not answers:
            raise HTTPException(503, "the engine runs without MorphServe")
        answer = combine(answers)
        return JSONResponse(answer, 200 if answer["ok"] else 422)


async def _text_of(request: Request, keys: Sequence[str]) -> str:
    """Return the body of a request that may have one.

    Raises:
        HTTPException: too long, no text, from somebody without a key, or from another site's page.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise HTTPException(413, f"the body has more than {_MAX_BODY_BYTES:,} bytes. Send `policy:` alone")
    try:
        text = body.decode()
    except UnicodeDecodeError as e:
        raise HTTPException(422, f"the body is not UTF-8 text ({e.reason} at byte {e.start})") from e
    if text.strip() in _NOTHING:
        return ""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    is_known = scheme.lower() == "bearer" and any(compare_digest(key.encode(), known.encode()) for known in keys)
    if keys and not is_known:
        raise HTTPException(401, "a policy in the body needs the server's API key. Send Authorization: Bearer KEY")
    origin = request.headers.get("Origin")  # browsers say whose page sends; nobody else does
    if origin is not None and urlsplit(origin).netloc != request.headers.get("Host"):
        raise HTTPException(403, f"a page of {origin[:80]} may not set this server's policy. Send it from a shell")
    return text


def combine(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one answer of one engine or more; where they differ, `engines` has them all."""
    refused = [answer for answer in answers if not answer["ok"]]
    first = (refused or answers)[0]
    whole = {"ok": not refused, "outcome": first["outcome"], "error": first["error"], "policy": first["policy"]}
    return whole if len(answers) == 1 else {**whole, "engines": answers}


def on_hangup(ask: Ask) -> bool:
    """Reload at SIGHUP, unless the process has other plans for it. Needs the event loop of the main thread.

    Returns:
        Whether SIGHUP is ours: not if it is ignored (nohup) or handled already.
    """
    if not hangup_is_free():
        return False
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGHUP, _start, loop, ask)
    except (RuntimeError, ValueError, NotImplementedError):  # another thread than the main one, or a loop without
        return False
    return True


def _start(loop: asyncio.AbstractEventLoop, ask: Ask) -> None:
    task = loop.create_task(_reload(ask))
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


async def _reload(ask: Ask) -> None:
    """Ask the engines, which say themselves what came of it."""
    try:
        answers = await asyncio.wait_for(ask("SIGHUP"), _TIMEOUT_S)
    except Exception as e:
        logger.error("morphserve: SIGHUP reached no engine (%s: %s); the policy stays", type(e).__name__, e)
        return
    for answer in answers:
        logger.info("morphserve: SIGHUP, engine %d: %s", answer["engine"], answer["outcome"])
