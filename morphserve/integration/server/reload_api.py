"""SIGHUP and `POST /morphserve/reload`: the engines read the policy from their YAML now, not within two seconds."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import JSONResponse

logger = logging.getLogger("vllm.morphserve")

Ask = Callable[[str], Awaitable[list[dict[str, Any]]]]  # from the cause to each engine's answer
_TIMEOUT_S = 60.0  # an engine answers between two steps, and one of a dead engine never

_tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps none alive


def add_route(router: APIRouter, ask: Ask) -> None:
    """Add `POST /reload`: 200, or 422 when an engine has refused the file; the body says why."""

    @router.post("/reload")
    async def reload() -> JSONResponse:
        """Take the `policy:` section from the YAML as it is now, in all engines: {ok, error, policy}."""
        try:
            answers = await asyncio.wait_for(ask("POST /morphserve/reload"), _TIMEOUT_S)
        except TimeoutError as e:
            raise HTTPException(504, f"an engine has not answered for {_TIMEOUT_S:.0f} s") from e
        if not answers:
            raise HTTPException(503, "the engine runs without MorphServe")
        answer = combine(answers)
        return JSONResponse(answer, 200 if answer["ok"] else 422)


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
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
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
