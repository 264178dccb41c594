"""The engines read the policy from their YAML now, not within two seconds: at SIGHUP, at `POST /morphserve/reload`, and
as an order of `admin_api.py`. All three have `reload_engines` do it.

Engines without a YAML take the policy from the body of a POST. Each engine does one reload at a time, whoever asks
(`control/reload/watch.py`), and tells the others that it is busy.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse

from morphserve.integration.server.routes.access import Access
from morphserve.integration.server.routes.body import alone, answered_within, busy, text_of
from morphserve.integration.server.tasks import Tasks
from morphserve.integration.start import hangup_is_free

logger = logging.getLogger("vllm.morphserve")


Call = Callable[..., Awaitable[list[dict[str, Any]]]]  # a utility method of every engine, by its name and arguments


class Ask(Protocol):
    """`reload_engines`, of the engines that there are."""

    def __call__(self, cause: str, sent: str = "") -> Awaitable[list[dict[str, Any]]]: ...


_MAX_BODY_BYTES = 65_536
_LASTING_LOOKS = 20  # ten seconds
_NOTHING = ("", "{}")  # what clients send that always send JSON, too
_TIMEOUT_S = 60.0  # two looks at a file, a second apart, and a wait for who writes it; a dead engine answers never


async def reload_engines(call: Call, cause: str, sent: str = "") -> list[dict[str, Any]]:
    """Have every engine read its settings anew, or a policy that was sent; return what came of it in each.

    What is sent all check before one takes it, so that none does where one refuses. A file each watches by itself.

    Raises:
        TimeoutError: one has not answered.
    """
    if sent:
        checked = await ask_engines(call, cause, sent, is_rehearsal=True)
        if not all(answer["ok"] for answer in checked):
            return checked
    return await ask_engines(call, cause, sent, is_rehearsal=False)


async def ask_engines(call: Call, cause: str, sent: str, is_rehearsal: bool) -> list[dict[str, Any]]:
    """Have every engine read its settings anew, or say whether it would take what it finds.

    Raises:
        TimeoutError: one has not answered.
    """
    async with answered_within(_TIMEOUT_S):
        return await call("morphserve_reload", cause, sent, is_rehearsal)


class Sameness:
    """Says when replicas serve different policies: each reads the file by itself, and one may refuse what others take.

    One WARNING, once it lasts longer than an edit takes to come round, and one INFO line when it ends.
    """

    def __init__(self) -> None:
        """Know of none that differ."""
        self._num_looks = 0  # in a row that have found them to differ

    def look(self, statuses: Sequence[dict[str, Any]]) -> None:
        """Compare what they say that they serve."""
        serves = {status["engine"]: status["policy"]["serves"] for status in statuses}
        if len(set(serves.values())) > 1:
            self._num_looks += 1
            if self._num_looks == _LASTING_LOOKS:
                by_engine = ", ".join(f"engine {engine} {digest}" for engine, digest in serves.items())
                logger.warning(
                    "morphserve: replicas serve different policies (%s): see `policy` of their status for why, and "
                    "reload",
                    by_engine,
                )
        elif statuses:
            if self._num_looks >= _LASTING_LOOKS:
                logger.info("morphserve: replicas serve the same policy again")
            self._num_looks = 0


def add_reload(router: APIRouter, ask: Ask, access: Callable[[], Access]) -> None:
    """Add `POST /reload`: 200, 422 when an engine has refused the policy, 429 while another reload is under way."""
    door = asyncio.Lock()

    @router.post("/reload")
    async def reload(request: Request) -> JSONResponse:
        """Take the `policy:` section from the YAML as it is now, in all engines: {ok, outcome, error, kind, changed}.

        A server that was started without a YAML takes it from the body, in JSON or YAML: {"policy": {"kind": ...}}
        """
        access().check_change(request)
        async with alone(door, "reload"):
            sent = await text_of(request, _MAX_BODY_BYTES)
            answer = await _reload_all("" if sent.strip() in _NOTHING else sent)
        if answer["outcome"] == "busy":  # one that SIGHUP or another API server has asked for
            raise busy("reload")
        return JSONResponse(answer, 200 if answer["ok"] else 422)

    async def _reload_all(sent: str) -> dict[str, Any]:
        try:
            answers = await ask("POST /morphserve/reload", sent)
        except TimeoutError as e:
            raise HTTPException(504, str(e)) from e
        if not answers:
            raise HTTPException(503, "the engine runs without MorphServe")
        return combine(answers)


def combine(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one answer of one engine or more; where they differ, `engines` has them all."""
    refused = [answer for answer in answers if not answer["ok"]]
    first = (refused or answers)[0]
    whole = {"ok": not refused, **{key: first[key] for key in ("outcome", "error", "kind", "changed")}}
    return whole if len(answers) == 1 else {**whole, "engines": answers}


def on_hangup(ask: Ask, tasks: Tasks) -> bool:
    """Reload at SIGHUP, unless the process has other plans for it. Needs the event loop of the main thread.

    Returns:
        Whether SIGHUP is ours: not if it is ignored (nohup) or handled already.
    """
    if not hangup_is_free():
        return False
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGHUP, lambda: tasks.start(_reload(ask)))
    except (RuntimeError, ValueError, NotImplementedError):  # another thread than the main one, or a loop without
        return False
    return True


async def _reload(ask: Ask) -> None:
    """Ask the engines, which say themselves what came of it."""
    try:
        answers = await ask("SIGHUP")
    except Exception as e:
        logger.error("morphserve: SIGHUP reached no engine (%s: %s); the policy stays", type(e).__name__, e)
        return
    for answer in answers:
        logger.info("morphserve: SIGHUP, engine %d: %s", answer["engine"], answer["outcome"])
