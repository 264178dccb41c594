"""Receipts for everyone: before the end of a stream, and in a header of a whole answer. And whose request it is.

vLLM hands a receipt to the client in the body of a whole answer alone. Here it is taken from what the engine's client
yields, and put where a client of any kind finds it, as `usage` is: into a chunk of its own with no choices, before
`data: [DONE]`; and into `X-MorphServe-Receipt`. Answers that ask for none pass through as they are.

The engine knows no API keys: a request that asks not to be served below a level is marked with a digest of its own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import aclosing
from contextvars import ContextVar
from hashlib import sha256
from typing import Any

HEADER = "X-MorphServe-Receipt"
_MAX_HEADER_BYTES = 2048  # of an answer of many choices; servers and proxies take 4 to 8 KiB of headers
_ASKS = "morphserve_"  # what a request's arguments for us begin with
_DONE = b"data: [DONE]"
_MAX_LEVEL, _KEY = "morphserve_max_level", "morphserve_key"
_KEY_DIGITS = 16  # of its SHA-256, as `policy.floors.keys` has them
_CHUNK_KEYS = ("id", "object", "created", "model")  # of a chunk, as clients know it

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class _Answer:
    """One answer on its way to the client."""

    def __init__(self, send: Send, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers  # of its request
        self.is_asked = False
        self.receipts: list[dict[str, Any]] = []  # one for each choice, in the order of their ends
        self._chunk = b""  # the last one

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on, with the receipts where it is the one for them."""
        if self.is_asked:
            body = message.get("body", b"")
            if message["type"] == "http.response.start" and self.receipts:
                message = {**message, "headers": [*message["headers"], (HEADER.lower().encode(), self._header())]}
            elif body.startswith(_DONE) and self.receipts:
                message = {**message, "body": self._last_chunk() + body}
            elif body.startswith(b"data: {"):
                self._chunk = body
        await self._send(message)

    @property
    def key(self) -> str | None:
        """The digest of the API key that the client has shown; None = none."""
        shown = next((value for name, value in self._headers if name == b"authorization"), b"")
        scheme, _, key = shown.partition(b" ")
        return sha256(key).hexdigest()[:_KEY_DIGITS] if scheme.lower() == b"bearer" and key else None

    def _header(self) -> bytes:
        """Return the receipts in a line, without what has an entry for every change of the level."""
        short = [{key: value for key, value in receipt.items() if key != "token_levels"} for receipt in self.receipts]
        line = _compact(short[0] if len(short) == 1 else short)
        if len(line) > _MAX_HEADER_BYTES:
            deepest = max(receipt["deepest_level"] for receipt in short)
            line = _compact({"receipts": len(short), "deepest_level": deepest, "full_precision": deepest == 0})
        return line

    def _last_chunk(self) -> bytes:
        try:
            before = json.loads(self._chunk.removeprefix(b"data: "))
        except ValueError:  # cut in two by somebody between
            before = {}
        known = {key: before[key] for key in _CHUNK_KEYS if key in before}
        receipts = self.receipts[0] if len(self.receipts) == 1 else self.receipts
        return b"data: " + _compact({**known, "choices": [], "morphserve": receipts}) + b"\n\n"


_current: ContextVar[_Answer | None] = ContextVar("morphserve_answer", default=None)


class ReceiptDoor:
    """ASGI middleware that lets what the engine yields find the answer that it belongs to."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, scope.get("headers", ()))
        mark = _current.set(answer)
        try:
            await self._app(scope, receive, answer.send)
        finally:
            _current.reset(mark)


def note_receipts(original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    """Wrap the engine client's `generate`: it notes receipts where a request asks for one, and marks whose it is."""

    @functools.wraps(original)
    def generate(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        answer, asked = _current.get(), getattr(sampling_params, "extra_args", None)
        if not asked or not any(key.startswith(_ASKS) for key in asked):
            return original(prompt, sampling_params, *args, **kwargs)
        asked.pop(_KEY, None)  # which clients could write themselves
        if _MAX_LEVEL in asked and answer is not None and (key := answer.key) is not None:
            asked[_KEY] = key
        outputs = original(prompt, sampling_params, *args, **kwargs)
        if answer is None:
            return outputs
        answer.is_asked = True
        return _noting(outputs, answer.receipts)

    return generate


async def _noting(outputs: AsyncGenerator[Any, None], receipts: list[dict[str, Any]]) -> AsyncGenerator[Any, None]:
    async with aclosing(outputs):  # whose client goes has the engine's request aborted by that
        async for output in outputs:
            receipt = (output.kv_transfer_params or {}).get("morphserve")
            if receipt is not None and receipt not in receipts[-1:]:
                receipts.append(receipt)
            yield output


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
