"""Receipts for everyone: before the end of a stream, and in a header of a whole answer. And whose request it is.

vLLM hands a receipt to the client in the body of a whole answer alone, and of several choices that of the one which
ends last. Here those of all choices are kept together, taken from what the engine's client yields, and put where a
client of any kind finds them, as `usage` is: into a chunk of its own with no choices, before `data: [DONE]`; and into
`X-MorphServe-Receipt`. Answers that ask for none pass through as they are.

Requests that ask not to be served below a level pass `floor_door.py` on the way.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from itertools import chain
from typing import Any

from morphserve.integration.server.floor_door import MAX_LEVEL_ARG, FloorDoor, Message, Sender, forget_marks
from morphserve.integration.spared import Spared

HEADER = "X-MorphServe-Receipt"
_MAX_HEADER_BYTES = 2048  # of an answer of many choices; servers and proxies take 4 to 8 KiB of headers
_ASKS = "morphserve_"  # what a request's arguments for us begin with
_DONE = b"data: [DONE]"
_CHUNK_KEYS = ("id", "object", "created", "model")  # of a chunk, as clients know it
_OURS = "morphserve"  # in `kv_transfer_params`
_OF_CHOICES = "morphserve_receipts"  # attribute of vLLM's record of an answer of several choices

Send = Callable[[Message], Awaitable[None]]
Receipt = dict[str, Any]
Outputs = AsyncGenerator[Any, None]

_spared = Spared("a receipt")  # vLLM makes everybody's outputs in one task, which an error would end


class _Answer:
    """One answer on its way to the client."""

    def __init__(self, send: Send, sender: Sender, floors: FloorDoor) -> None:
        self._send = send
        self.sender = sender
        self.floors = floors
        self._by_prompt: list[list[Receipt | None]] = []  # a row for each prompt, in it one for each choice
        self._chunk = b""  # the last one

    def add_prompt(self, num_choices: int) -> list[Receipt | None]:
        """Return what to note the receipts of one more prompt in, by choice."""
        row: list[Receipt | None] = [None] * num_choices
        self._by_prompt.append(row)
        return row

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on, with the receipts where it is the one for them."""
        with _spared:
            message = self._with_ours(message)
        await self._send(message)

    def _with_ours(self, message: Message) -> Message:
        if (wait_s := self.sender.retry_after_s) is not None and message.get("status") == 503:
            message = _with_header(message, b"retry-after", b"%d" % wait_s)
        _ = self.sender.model  # vLLM may ask its engine only now
        if self._by_prompt:
            body = message.get("body", b"")
            if message["type"] == "http.response.start" and any(receipts := self._receipts):
                message = _with_header(message, HEADER.lower().encode(), _header(receipts))
            elif body.startswith(_DONE) and any(receipts := self._receipts):
                message = {**message, "body": self._last_chunk(receipts) + body}
            elif body.startswith(b"data: {"):
                self._chunk = body
        return message

    @property
    def _receipts(self) -> list[Receipt | None]:
        """One for each choice, in their order; None of one that has not told any."""
        return list(chain(*self._by_prompt))

    def _last_chunk(self, receipts: list[Receipt | None]) -> bytes:
        try:
            before = json.loads(self._chunk.removeprefix(b"data: "))
        except ValueError:  # cut in two by somebody between
            before = {}
        known = {key: before[key] for key in _CHUNK_KEYS if key in before}
        told = receipts[0] if len(receipts) == 1 else receipts
        return b"data: " + _compact({**known, "choices": [], _OURS: told}) + b"\n\n"


_current: ContextVar[_Answer | None] = ContextVar("morphserve_answer", default=None)


class ReceiptDoor:
    """ASGI middleware that lets what the engine yields find the answer that it belongs to."""

    def __init__(self, app: Callable[..., Awaitable[None]], floors: FloorDoor) -> None:
        self._app = app
        self._floors = floors

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


def note_receipts(original: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Wrap the engine client's `generate`: it notes receipts where a request asks for one; some pass another door."""

    @functools.wraps(original)
    def generate(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Outputs:
        answer, asked = _current.get(), getattr(sampling_params, "extra_args", None)
        if answer is not None and MAX_LEVEL_ARG not in (asked or ()):
            answer.sender.forget_body()
        if not asked or not any(key.startswith(_ASKS) for key in asked):
            return original(prompt, sampling_params, *args, **kwargs)
        forget_marks(asked)
        if MAX_LEVEL_ARG in asked and answer is not None:
            adapter = kwargs.get("lora_request")
            answer.floors.admit(asked, answer.sender, None if adapter is None else adapter.lora_name)
        outputs = original(prompt, sampling_params, *args, **kwargs)
        return outputs if answer is None else _noting(outputs, answer.add_prompt(sampling_params.n))

    return generate


def forget_forged_marks(original: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Wrap `generate` of every engine client: where no door marks requests, as in `vllm run-batch`, none is marked."""

    @functools.wraps(original)
    def generate(client: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Outputs:
        if _current.get() is None and (asked := getattr(sampling_params, "extra_args", None)):
            forget_marks(asked)
        return original(client, prompt, sampling_params, *args, **kwargs)

    return generate


async def _noting(outputs: Outputs, receipts: list[Receipt | None]) -> Outputs:
    async with aclosing(outputs):  # whose client goes has the engine's request aborted by that
        async for output in outputs:
            with _spared:
                told = (output.kv_transfer_params or {}).get(_OURS)
                if told is not None:
                    receipts[:] = told if isinstance(told, list) else [told]
            yield output


def keep_all_receipts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what makes a client's output: of several choices the last one has the receipts of all, in a list.

    vLLM hands on what the choice that ends last has told; and where it joins two outputs of a stream, the later one's.
    """

    shape = inspect.signature(original)

    @functools.wraps(original)
    def make_request_output(state: Any, *args: Any, **named: Any) -> Any:
        if state.parent_req is None:
            return original(state, *args, **named)
        with _spared:
            call = shape.bind(state, *args, **named)
            if call.arguments["finish_reason"] is not None:
                _add_siblings(state, call.arguments)
            args, named = call.args[1:], call.kwargs
        return original(state, *args, **named)

    return make_request_output


def _add_siblings(state: Any, given: dict[str, Any]) -> None:
    """Let the end of one of several choices tell what has been told of all so far."""
    told = given.get("kv_transfer_params") or {}
    receipts: list[Receipt | None] | None = getattr(state.parent_req, _OF_CHOICES, None)
    if receipts is None:
        if _OURS not in told:
            return
        receipts = [None] * state.parent_req.n
        setattr(state.parent_req, _OF_CHOICES, receipts)
    receipts[state.request_index] = told.get(_OURS)
    given["kv_transfer_params"] = {**told, _OURS: receipts}


def _with_header(message: Message, name: bytes, value: bytes) -> Message:
    return {**message, "headers": [*message.get("headers", ()), (name, value)]}


def _header(receipts: list[Receipt | None]) -> bytes:
    """Return the receipts in a line, without what has an entry for every change of the level."""
    short = [told and {key: value for key, value in told.items() if key != "token_levels"} for told in receipts]
    line = _compact(short[0] if len(short) == 1 else short)
    if len(line) > _MAX_HEADER_BYTES:
        known = [told for told in receipts if told is not None]
        deepest = max(told["deepest_level"] for told in known)
        is_full = deepest == 0 and len(known) == len(receipts)
        line = _compact({"receipts": len(known), "deepest_level": deepest, "full_precision": is_full})
    return line


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
