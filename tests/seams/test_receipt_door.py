"""Receipts in streams and in headers: where clients find them, and where nobody asked for one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from vllm import SamplingParams

from morphserve.integration import seams
from morphserve.integration.server.receipt_door import HEADER, ReceiptDoor, note_receipts

RECEIPT = {
    "output_tokens": {"0": 2, "3": 1}, "deepest_level": 3, "full_precision": False, "token_levels": [[0, 2], [3, 1]],
}  # fmt: skip
CHUNK = {"id": "cmpl-1", "object": "text_completion", "created": 7, "model": "demo"}


class Client:
    """The engine's client as far as the door knows it: each request makes three outputs, the last with its receipt."""

    def __init__(self, num_receipts: int = 1) -> None:
        self.num_receipts, self.closed = num_receipts, 0

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
        try:
            for number in range(3):
                yield SimpleNamespace(kv_transfer_params=None, number=number)
            asked = sampling_params.extra_args or {}
            for number in range(self.num_receipts):
                receipt = {"morphserve": {**RECEIPT, "reused_tokens": {"0": number}}}
                yield SimpleNamespace(kv_transfer_params=receipt if asked.get("morphserve_receipt") else None, number=3)
        finally:
            self.closed += 1


def app_of(client: Client, **asked: Any) -> TestClient:
    """An API that answers as vLLM's does, behind the door."""
    app = FastAPI()
    seams.wrap(seams.CLIENT_GENERATE, note_receipts, on=client)
    params = SamplingParams(extra_args=asked or None)

    @app.post("/whole")
    async def whole(request: Request) -> JSONResponse:
        await request.body()
        return JSONResponse({"outputs": [output.number async for output in client.generate("", params, "r")]})

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        outputs = client.generate("", params, "r")

        async def chunks() -> AsyncIterator[str]:
            async for output in outputs:
                yield f"data: {json.dumps({**CHUNK, 'choices': [output.number]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    app.add_middleware(ReceiptDoor)
    return TestClient(app)


def test_a_whole_answer_has_its_receipt_in_a_header() -> None:
    """Guards: a receipt that only clients find which read vLLM's own field; a header with a line for each change."""
    answer = app_of(Client(), morphserve_receipt=1).post("/whole")
    found = json.loads(answer.headers[HEADER])
    assert found["deepest_level"] == 3 and found["output_tokens"] == {"0": 2, "3": 1} and "token_levels" not in found
    assert answer.json() == {"outputs": [0, 1, 2, 3]}


def test_a_stream_has_its_receipt_before_its_end() -> None:
    """Guards: no receipt for who streams; one that clients take for the end, or for text."""
    text = app_of(Client(), morphserve_receipt=1).post("/stream").text
    *_, chunk, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    receipt = {**RECEIPT, "reused_tokens": {"0": 0}}
    assert json.loads(chunk.removeprefix("data: ")) == {**CHUNK, "choices": [], "morphserve": receipt}
    assert text.count("data: ") == 6


@pytest.mark.parametrize("asked", [{}, {"other": 1}, {"morphserve_tpot_s": 0.1}])
def test_who_asks_for_none_gets_what_vllm_sends(asked: dict[str, Any]) -> None:
    """Guards: a chunk or a header in answers of others."""
    client = app_of(Client(), **asked)
    answer = client.post("/stream")
    assert answer.text.count("data: ") == 5 and HEADER not in answer.headers
    assert HEADER not in client.post("/whole").headers


def test_an_answer_of_many_choices_has_a_short_header() -> None:
    """Guards: a header so long that a proxy refuses the answer; receipts of some choices lost."""
    found = json.loads(app_of(Client(3), morphserve_receipt=1).post("/whole").headers[HEADER])
    assert [receipt["reused_tokens"] for receipt in found] == [{"0": 0}, {"0": 1}, {"0": 2}]
    found = json.loads(app_of(Client(500), morphserve_receipt=1).post("/whole").headers[HEADER])
    assert found == {"receipts": 500, "deepest_level": 3, "full_precision": False}


def test_nothing_stands_between_those_who_ask_for_none() -> None:
    """Guards: one generator more for each token of everybody."""
    client = Client()
    code = client.generate.__code__
    seams.wrap(seams.CLIENT_GENERATE, note_receipts, on=client)
    for asked in (None, {"morphserve_receipt": 1}):  # nor where no HTTP request is behind it
        outputs: Any = client.generate("", SamplingParams(extra_args=asked), "r")
        assert outputs.ag_code is code


def test_the_engine_is_told_whose_it_was() -> None:
    """Guards: a client that writes another's key or model into its request; either that travels for who asks for no
    level; what is no name taken for one."""
    seen: list[Any] = []

    class Recorder(Client):
        async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
            seen.append(dict(sampling_params.extra_args))
            yield SimpleNamespace(kv_transfer_params=None, number=0)

    digest = "2bb80d537b1da3e3"  # printf %s secret | sha256sum | cut -c 1-16
    shown = {"Authorization": "Bearer secret"}
    asks = {"morphserve_max_level": 0}
    for asked, headers, key in (
        ({**asks, "morphserve_key": "forged"}, shown, digest),
        ({**asks, "morphserve_key": digest}, {}, None),
        ({**asks, "morphserve_key": digest}, {"Authorization": "Basic secret"}, None),
        ({"morphserve_receipt": 1, "morphserve_key": digest}, shown, None),
    ):
        app_of(Recorder(), **asked).post("/whole", headers=headers)
        assert seen.pop().get("morphserve_key") == key
    for asked, content, model in (
        ({**asks, "morphserve_model": "forged"}, b'{"model": "exact", "prompt": "Hello"}', "exact"),
        ({**asks, "morphserve_model": "forged"}, b'{"prompt": "Hello"}', None),
        (asks, b'{"model": ["exact"]}', None),
        (asks, b'["model"]', None),
        (asks, b"no JSON", None),
        (asks, b"[" * 100_000, None),
        ({"morphserve_receipt": 1, "morphserve_model": "exact"}, b'{"model": "exact"}', None),
    ):
        app_of(Recorder(), **asked).post("/whole", content=content)
        assert seen.pop().get("morphserve_model") == model


def test_a_client_that_goes_ends_its_request() -> None:
    """Guards: the engine's request goes on for nobody, because what the door put around it was closed alone."""
    client = Client()
    seams.wrap(seams.CLIENT_GENERATE, note_receipts, on=client)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        outputs: Any = client.generate("", SamplingParams(extra_args={"morphserve_receipt": 1}), "r")
        await anext(outputs)
        await outputs.aclose()

    async def nothing(*_: Any) -> dict[str, Any]:
        return {}

    asyncio.run(ReceiptDoor(app)({"type": "http", "method": "POST"}, nothing, nothing))  # type: ignore[arg-type]
    assert client.closed == 1
