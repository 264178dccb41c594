"""Receipts for everyone: before the end of a stream, and in a header of a whole answer. And whose request it is.

vLLM hands a receipt to the client in the body of a whole answer alone. Here it is taken from what the engine's client
yields, and put where a client of any kind finds it, as `usage` is: into a chunk of its own with no choices, before
`data: [DONE]`; and into `X-MorphServe-Receipt`. Answers that ask for none pass through as they are.

Requests that ask not to be served below a level pass `floor_door.py` on the way.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from morphserve.integration.server.floor_door import MAX_LEVEL_ARG, FloorDoor, Message, Sender, forget_marks

HEADER = "X-MorphServe-Receipt"
_MAX_HEADER_BYTES = 2048  # of an answer of many choices; servers and proxies take 4 to 8 KiB of headers
_ASKS = "morphserve_"  # what a request's arguments for us begin with
_DONE = b"data: [DONE]"
_CHUNK_KEYS = ("id", "object", "created", "model")  # of a chunk, as clients know it

Send = Callable[[Message], Awaitable[None]]


class _Answer:
    """One answer on its way to the client."""

    def __init__(self, send: Send, sender: Sender, floors: FloorDoor) -> None:
        self._send = send
        self.sender = sender
        self.floors = floors
        self.is_asked = False
        self.receipts: list[dict[str, Any]] = []  # one for each choice, in the order of their ends
        self._chunk = b""  # the last one

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on, with the receipts where it is the one for them."""
        if (wait_s := self.sender.retry_after_s) is not None and message.get("status") == 503:
            message = {**message, "headers": [*message["headers"], (b"retry-after", b"%d" % wait_s)]}
        if self.is_asked:
            body = message.get("body", b"")
            if message["type"] == "http.response.start" and self.receipts:
                message = {**message, "headers": [*message["headers"], (HEADER.lower().encode(), self._header())]}
            elif body.startswith(_DONE) and self.receipts:
                message = {**message, "body": self._last_chunk() + body}
            elif body.startswith(b"data: {"):
                self._chunk = body
        await self._send(message)

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

    def __init__(self, app: Callable[..., Awaitable[None]], floors: FloorDoor | None = None) -> None:
        self._app = app
        self._floors = floors or FloorDoor()

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, Sender(scope.get("headers", ())), self._floors)
        if self._floors.heeds_models:
            receive = answer.sender.listen(receive)
        mark = _current.set(answer)
        try:
            await self._app(scope, receive, answer.send)
        finally:
            _current.reset(mark)


def note_receipts(original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    """Wrap the engine client's `generate`: it notes receipts where a request asks for one; some pass another door."""

    @functools.wraps(original)
    def generate(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        answer, asked = _current.get(), getattr(sampling_params, "extra_args", None)
        if not asked or not any(key.startswith(_ASKS) for key in asked):
            return original(prompt, sampling_params, *args, **kwargs)
        forget_marks(asked)
        if MAX_LEVEL_ARG in asked and answer is not None:
            adapter = kwargs.get("lora_request")
            answer.floors.admit(asked, answer.sender, None if adapter is None else adapter.lora_name)
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
