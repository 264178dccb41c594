"""Receipts in streams and in headers: where clients find them, and where nobody asked for one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from copy import copy
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from morphserve.integration import seams, spared
from morphserve.integration.server import receipt_door
from morphserve.integration.server.floor_door import FloorDoor
from morphserve.integration.server.receipt_door import (
    HEADER,
    ReceiptDoor,
    forget_forged_marks,
    keep_all_receipts,
    note_receipts,
)
from morphserve.integration.server.scrape import Refusals
from morphserve.integration.spared import Spared

DOOR = FloorDoor(Refusals())
RECEIPT = {
    "output_tokens": {"0": 2, "3": 1}, "deepest_level": 3, "full_precision": False, "token_levels": [[0, 2], [3, 1]],
}  # fmt: skip
CHUNK = {"id": "cmpl-1", "object": "text_completion", "created": 7, "model": "demo"}


class Client:
    """The engine's client as far as the door knows it: each request makes four outputs, the last with its receipts."""

    def __init__(self, receipts: Any = RECEIPT) -> None:
        self.receipts, self.closed = receipts, 0

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
        try:
            for number in range(3):
                yield SimpleNamespace(kv_transfer_params=None, number=number)
            asked = (sampling_params.extra_args or {}).get("morphserve_receipt")
            yield SimpleNamespace(kv_transfer_params={"morphserve": self.receipts} if asked else None, number=3)
        finally:
            self.closed += 1


async def nothing(*_: Any) -> dict[str, Any]:
    return {}


def receipt_of(number: int, level: int = 3) -> dict[str, Any]:
    return {**RECEIPT, "reused_tokens": {"0": number}, "deepest_level": level}


def app_of(client: Client, num_choices: int = 1, **asked: Any) -> TestClient:
    """An API that answers as vLLM's does, behind the door."""
    app = FastAPI()
    seams.wrap(seams.CLIENT_GENERATE, note_receipts, on=client)
    params = SamplingParams(n=num_choices, temperature=1.0, extra_args=asked or None)

    @app.post("/whole")
    async def whole(request: Request) -> JSONResponse:
        await request.body()
        return JSONResponse({"outputs": [output.number async for output in client.generate("", params, "r")]})

    @app.post("/prompts")
    async def prompts() -> JSONResponse:
        first, second = (client.generate(prompt, params, prompt) for prompt in ("a", "b"))
        client.receipts = receipt_of(2)
        numbers = [output.number async for output in second]  # ends first
        client.receipts = receipt_of(1)
        return JSONResponse({"outputs": numbers + [output.number async for output in first]})

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        outputs = client.generate("", params, "r")

        async def chunks() -> AsyncIterator[str]:
            async for output in outputs:
                yield f"data: {json.dumps({**CHUNK, 'choices': [output.number]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    app.add_middleware(ReceiptDoor, floors=DOOR)
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
    assert json.loads(chunk.removeprefix("data: ")) == {**CHUNK, "choices": [], "morphserve": RECEIPT}
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
    three = [receipt_of(number) for number in range(3)]
    found = json.loads(app_of(Client(three), 3, morphserve_receipt=1).post("/whole").headers[HEADER])
    assert [receipt["reused_tokens"] for receipt in found] == [{"0": 0}, {"0": 1}, {"0": 2}]
    many = [receipt_of(number) for number in range(500)]
    found = json.loads(app_of(Client(many), 500, morphserve_receipt=1).post("/whole").headers[HEADER])
    assert found == {"receipts": 500, "deepest_level": 3, "full_precision": False}


def test_a_choice_without_a_receipt_is_seen() -> None:
    """Guards: full precision said of an answer of which one choice has told nothing; receipts that move up a place."""
    some = [receipt_of(0, level=0), None, receipt_of(2, level=0)]
    client = app_of(Client(some), 3, morphserve_receipt=1)
    found = json.loads(client.post("/whole").headers[HEADER])
    assert found[1] is None and found[2]["reused_tokens"] == {"0": 2}
    chunk = client.post("/stream").text.split("\n\n")[-3]
    assert json.loads(chunk.removeprefix("data: "))["morphserve"] == some
    many = [*(receipt_of(number, level=0) for number in range(99)), None]
    found = json.loads(app_of(Client(many), 100, morphserve_receipt=1).post("/whole").headers[HEADER])
    assert found == {"receipts": 99, "deepest_level": 0, "full_precision": False}


def test_receipts_stand_in_the_order_of_their_prompts() -> None:
    """Guards: the receipt of one prompt taken for another's, because that one has ended first; one of two lost."""
    found = json.loads(app_of(Client(), morphserve_receipt=1).post("/prompts").headers[HEADER])
    assert [receipt["reused_tokens"] for receipt in found] == [{"0": 1}, {"0": 2}]


# ---- several choices, as vLLM joins them


class Choices:
    """An answer of several choices in vLLM's own output processor, as the engine's client has it."""

    def __init__(self, kind: RequestOutputKind, num_choices: int = 3) -> None:
        asked = {"morphserve_receipt": 1}
        params = SamplingParams(n=num_choices, temperature=1.0, output_kind=kind, extra_args=asked, detokenize=False)
        request = EngineCoreRequest("r", [1, 2], None, params, None, 0.0, None, None, None, external_req_id="r")
        self.processor = OutputProcessor(None, log_stats=False)
        self.queue = RequestOutputCollector(kind, "r")
        parent = ParentRequest(request)
        for index in range(num_choices):
            name, own = parent.get_child_info(index)
            child = copy(request)
            child.request_id, child.sampling_params = name, own
            self.processor.add_request(child, None, parent, index, self.queue)

    def step(self, *choices: int, ends: dict[int, dict[str, Any] | None] | None = None) -> None:
        """One token of each of `choices`; those of `ends` end with it, and tell that receipt."""
        ends = ends or {}
        told = {index: receipt and {"morphserve": receipt} for index, receipt in ends.items()}
        self.processor.process_outputs(
            [
                EngineCoreOutput(
                    f"{index}_r", [7], finish_reason=FinishReason.LENGTH if index in ends else None,
                    kv_transfer_params=told.get(index),
                )
                for index in (*choices, *ends)
            ]
        )  # fmt: skip

    def told(self) -> Any:
        """What the client's next output says of receipts."""
        output = self.queue.get_nowait()
        assert output is not None
        return (output.kv_transfer_params or {}).get("morphserve")


@pytest.fixture
def joined() -> Iterator[None]:
    patch = seams.wrap(seams.CHOICE_OUTPUT, keep_all_receipts)
    yield
    if patch is not None:
        patch.undo()


@pytest.mark.parametrize("kind", [RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA])
def test_each_of_several_choices_has_its_receipt(joined: None, kind: RequestOutputKind) -> None:
    """Guards: full precision said of an answer whose other choices came from quantized layers: vLLM hands on what the
    choice that ends last has told, and of a client that lags not even that."""
    choices = Choices(kind)
    choices.step(0, 1, 2)
    choices.step(0, 2, ends={1: receipt_of(1)})
    choices.step(2, ends={0: receipt_of(0)})
    choices.step(ends={2: receipt_of(2, level=0)})
    assert choices.told() == [receipt_of(0), receipt_of(1), receipt_of(2, level=0)]


@pytest.mark.parametrize("kind", [RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA])
def test_a_choice_that_tells_nothing_takes_no_other_along(joined: None, kind: RequestOutputKind) -> None:
    """Guards: receipts of all lost because the last choice ends in the API server, at a stop string, and has none."""
    choices = Choices(kind)
    choices.step(ends={0: receipt_of(0), 1: None})
    choices.step(ends={2: None})
    assert choices.told() == [receipt_of(0), None, None]


def test_a_client_that_goes_meets_no_error(joined: None) -> None:
    """Guards: an abort, for which vLLM names its arguments, ends the task that makes everybody's outputs."""
    choices = Choices(RequestOutputKind.DELTA)
    choices.step(0, 1, ends={2: receipt_of(2)})
    assert choices.told() == [None, None, receipt_of(2)]
    assert choices.processor.abort_requests(["r"], internal=False)
    assert choices.told() == [None, None, receipt_of(2)]


def test_choices_that_ask_for_none_are_told_nothing(joined: None) -> None:
    """Guards: a list of nothing in the answers of others."""
    choices = Choices(RequestOutputKind.FINAL_ONLY)
    choices.step(ends={0: None, 1: None, 2: None})
    assert choices.told() is None


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What an error of ours is told by, while nobody has been told of one."""
    said: list[str] = []
    monkeypatch.setattr(receipt_door, "_spared", Spared("a receipt"))
    monkeypatch.setattr(spared.logger, "warning", lambda text, *args, **more: said.append(text % args))
    return said


def fails(*_: Any) -> Any:
    raise RuntimeError("an error of ours")


def test_an_error_of_ours_costs_the_receipts_of_the_choices(
    joined: None, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    """Guards: one error in the task that makes everybody's outputs, which vLLM ends, and with it all requests."""
    monkeypatch.setattr(receipt_door, "_add_siblings", fails)
    choices = Choices(RequestOutputKind.FINAL_ONLY)
    choices.step(0, 1, 2)
    choices.step(ends={number: receipt_of(number) for number in range(3)})
    output = choices.queue.get_nowait()
    assert [choice.token_ids for choice in output.outputs] == [[7, 7]] * 3  # type: ignore[union-attr]
    assert len(lines) == 1 and "an error costs a receipt" in lines[0]


@pytest.mark.parametrize(("part", "path"), [("_header", "/whole"), ("_compact", "/stream")])
def test_an_error_of_ours_costs_the_receipt_of_an_answer(
    part: str, path: str, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    """Guards: an answer that its client does not get, for what was to be told with it."""
    monkeypatch.setattr(receipt_door, part, fails)
    for _ in range(2):
        answer = app_of(Client(), morphserve_receipt=1).post(path)
        assert answer.status_code == 200 and HEADER not in answer.headers and "morphserve" not in answer.text
        assert answer.text.endswith("data: [DONE]\n\n") or answer.json() == {"outputs": [0, 1, 2, 3]}
    assert len(lines) == 1


def test_an_output_that_nobody_can_read_is_handed_on(lines: list[str]) -> None:
    """Guards: an answer cut off by what stands between the engine's client and its caller."""

    class Unreadable(Client):
        async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
            for number in range(3):
                yield SimpleNamespace(number=number)

    answer = app_of(Unreadable(), morphserve_receipt=1).post("/whole")
    assert answer.json() == {"outputs": [0, 1, 2]} and len(lines) == 1


@pytest.mark.parametrize("refused", [False, True])
def test_an_answer_without_headers_gets_ours(refused: bool) -> None:
    """Guards: an application that leaves out what ASGI lets it leave out, and its answer with it."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        answer = receipt_door._current.get()
        assert answer is not None
        answer.sender.retry_after_s = 5 if refused else None
        answer.add_prompt(1)[0] = receipt_of(1)
        await send({"type": "http.response.start", "status": 503 if refused else 200})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(ReceiptDoor(app, DOOR)({"type": "http", "method": "POST"}, nothing, send))  # type: ignore[arg-type]
    names = {name.decode() for name, _ in sent[0]["headers"]}
    assert names == {HEADER.lower()} | ({"retry-after"} if refused else set())


def test_nothing_stands_between_those_who_ask_for_none() -> None:
    """Guards: one generator more for each token of everybody."""
    client = Client()
    code = client.generate.__code__
    seams.wrap(seams.CLIENT_GENERATE, note_receipts, on=client)

    def stands_between(asked: dict[str, Any] | None) -> bool:
        outputs: Any = client.generate("", SamplingParams(extra_args=asked), "r")
        return outputs.ag_code is not code

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found = [stands_between(asked) for asked in (None, {"other": 1}, {"morphserve_receipt": 1})]
        assert found == [False, False, True]

    asyncio.run(ReceiptDoor(app, DOOR)({"type": "http", "method": "POST"}, nothing, nothing))  # type: ignore[arg-type]
    assert not stands_between({"morphserve_receipt": 1}), "nor where no HTTP request is behind it"


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


def test_nobody_forges_a_mark_where_no_door_is() -> None:
    """Guards: another's key or model in a file of `vllm run-batch`, which has no HTTP; marks of the door's own lost."""
    seen: list[Any] = []

    class Recorder(Client):
        @forget_forged_marks
        async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
            seen.append(dict(sampling_params.extra_args or {}))
            yield SimpleNamespace(kv_transfer_params=None, number=0)

    async def run() -> None:
        for asked in (None, {"morphserve_max_level": 0, "morphserve_key": "forged", "morphserve_model": "forged"}):
            async for _ in Recorder().generate("", SamplingParams(extra_args=asked), "r"):
                pass

    asyncio.run(run())
    assert seen == [{}, {"morphserve_max_level": 0}]
    app_of(Recorder(), morphserve_max_level=0).post("/whole", headers={"Authorization": "Bearer secret"})
    assert seen[-1]["morphserve_key"] == "2bb80d537b1da3e3"


def test_a_client_that_goes_ends_its_request() -> None:
    """Guards: the engine's request goes on for nobody, because what the door put around it was closed alone."""
    client = Client()
    seams.wrap(seams.CLIENT_GENERATE, note_receipts, on=client)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        outputs: Any = client.generate("", SamplingParams(extra_args={"morphserve_receipt": 1}), "r")
        await anext(outputs)
        await outputs.aclose()
        assert client.closed == 1, "at once, not when somebody collects it"

    asyncio.run(ReceiptDoor(app, DOOR)({"type": "http", "method": "POST"}, nothing, nothing))  # type: ignore[arg-type]
    assert client.closed == 1
