"""Requests that would wait for their level, where the operator has them refused: who is told so, and how."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from seams.asked import endpoint_of
from vllm import SamplingParams
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from morphserve.integration import seams
from morphserve.integration.server import floor_door
from morphserve.integration.server.floor_door import KEY_ARG, MODEL_ARG, FloorDoor
from morphserve.integration.server.receipt_door import ReceiptDoor, note_receipts
from morphserve.integration.server.scrape import Refusals

KEY = "2bb80d537b1da3e3"  # printf %s secret | sha256sum | cut -c 1-16
LADDER = [
    {"level": level, "layers_by_format": formats, "weight_bytes": 9, "num_kv_blocks": 9}
    for level, formats in enumerate(({"base": 4}, {"base": 2, "w8": 2}, {"w8": 4}, {"w8": 2, "w4": 2}, {"w4": 4}))
]


def status(min_floor: int = 0, heeds_models: bool = False, **levels: Any) -> dict[str, Any]:
    """What an engine says; `levels` of who may ask."""
    floors = {"min_floor": min_floor, "heeds_models": heeds_models}
    allowed = {"shallowest": 0, "models": {}, "keys": {}, **levels}
    return {"ladder": LADDER, "floors": {**floors, "levels": allowed} if min_floor else floors}


class Client:
    """Of an engine."""


class Served:
    """An API as vLLM answers, with its own handlers of errors, and an engine behind it that makes one output."""

    def __init__(self, door: FloorDoor) -> None:
        self.seen: list[dict[str, Any]] = []
        app = FastAPI()
        init_exception_handler(app)
        app.state.args = SimpleNamespace(log_error_stack=False)
        client: Any = Client()
        client.generate = self._generate
        seams.wrap(seams.CLIENT_GENERATE, note_receipts, on=client)

        @app.post("/v1/completions")
        async def answer(body: dict[str, Any]) -> Any:
            params = SamplingParams(extra_args=body.get("vllm_xargs"))
            adapter = SimpleNamespace(lora_name="tuned") if body.get("model") == "tuned" else None
            outputs = client.generate("", params, "r", lora_request=adapter)
            if not body.get("stream"):
                return JSONResponse([output.number async for output in outputs])

            async def chunks() -> AsyncIterator[str]:
                async for output in outputs:
                    yield f"data: {json.dumps({'choices': [output.number]})}\n\n"
                yield "data: [DONE]\n\n"

            return StreamingResponse(chunks(), media_type="text/event-stream")

        app.add_middleware(ReceiptDoor, floors=door)
        self.http = TestClient(app, raise_server_exceptions=False)

    async def _generate(self, prompt: Any, sampling_params: Any, request_id: str, lora_request: Any = None) -> Any:
        self.seen.append(dict(sampling_params.extra_args or {}))
        yield SimpleNamespace(kv_transfer_params=None, number=7)

    def ask(self, level: object = None, key: str = "", **body: Any) -> Any:
        body |= {} if level is None else {"vllm_xargs": {"morphserve_max_level": level}}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.http.post("/v1/completions", json=body, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
def test_who_is_refused_is_told_why_and_when_to_come_back(stream: bool) -> None:
    """Guards: an answer that has begun when it turns out that there is none; a 500, or a 503 without a reason; a
    request that reaches the engine all the same."""
    door = FloorDoor(Refusals())
    door.hear([status(3)])
    served = Served(door)
    answer = served.ask(0, stream=stream)
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
    said = answer.json()["error"]
    assert said["code"] == 503 and "morphserve_max_level" in said["message"] and "hold_s" in said["message"]
    assert "level 0" in said["message"] and "level 3" in said["message"] and not served.seen
    assert door._refusals.counter.labels("floor")._value.get() == 1
    taken = served.ask(stream=stream)
    assert taken.status_code == 200 and "7" in taken.text and "Retry-After" not in taken.headers


@pytest.mark.parametrize(
    ("asked", "levels", "is_taken"),
    [
        ({"level": 2}, {}, False),
        ({"level": 3}, {}, True),  # it is served at the load's level, too
        ({"level": "8bit"}, {}, False),
        ({"level": "w4"}, {}, True),
        ({"level": "none"}, {}, True),  # no level: served as any other, and the engine's log says so
        ({"level": [0]}, {}, True),
        ({"level": 0}, {"shallowest": None}, True),  # who may not ask is served as who has not
        ({"level": 0}, {"shallowest": 3}, True),
        ({"level": 0, "key": "secret"}, {"shallowest": None, "keys": {KEY: 0}}, False),
        ({"level": 0, "key": "other"}, {"shallowest": None, "keys": {KEY: 0}}, True),
        ({"level": 0, "model": "exact"}, {"shallowest": None, "models": {"exact": 0}}, False),
        ({"level": 0, "model": "usual"}, {"shallowest": None, "models": {"exact": 0}}, True),
        ({"level": 0, "model": "tuned"}, {"shallowest": None, "models": {"tuned": 0}}, False),
    ],
)
def test_those_are_refused_who_would_wait(asked: dict[str, Any], levels: dict[str, Any], is_taken: bool) -> None:
    """Guards: a door that judges otherwise than the engine: who would not wait refused, or who would let in."""
    door = FloorDoor(Refusals())
    door.hear([status(3, heeds_models="models" in levels, **levels)])
    assert (Served(door).ask(**asked).status_code == 200) is is_taken


def test_the_door_follows_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a door that stays shut after the burst, or because nobody answers; one that one replica shuts for all; a
    line for each poll."""
    lines: list[str] = []
    log = SimpleNamespace(
        warning=lambda text, *args: lines.append(f"WARNING {text % args}"),
        info=lambda text: lines.append(f"INFO {text}"),
    )
    monkeypatch.setattr(floor_door, "logger", log)
    door = FloorDoor(Refusals())
    served, codes = Served(door), []
    for statuses in ([], [status(3)], [status(2)], [], [status(2), status()], [status(2), status(1)], [status()]):
        door.hear(statuses)
        codes.append(served.ask(0).status_code)
    assert codes == [200, 503, 503, 200, 200, 503, 200]
    assert [line.split()[0] for line in lines] == ["WARNING", "INFO", "WARNING", "INFO"]


def test_names_of_models_are_listened_for_where_they_matter() -> None:
    """Guards: a copy of every body for nothing; no name in the engine where the operator goes by names."""
    door = FloorDoor(Refusals())
    served = Served(door)
    for said, model in ((None, "exact"), (False, None), (True, "exact")):
        if said is not None:
            door.hear([status(heeds_models=said)])
        assert served.ask(0, key="secret", model="exact").status_code == 200
        marks = served.seen.pop()
        assert (marks.get(MODEL_ARG), marks[KEY_ARG]) == (model, KEY)


@pytest.mark.parametrize(("asks", "is_lazy"), [(True, False), (False, False), (True, True), (None, False)])
def test_a_body_is_not_kept_for_as_long_as_its_answer(asks: bool | None, is_lazy: bool) -> None:
    """Guards: the prompts of all who stream, a second time in memory; no name of the model where vLLM asks its engine
    only when the answer has begun.

    `asks`: for a level, None = the engine is not asked at all.
    """
    door, seen = FloorDoor(Refusals()), []
    body = json.dumps({"model": "exact", "prompt": "a" * 1000}).encode()

    async def engine(prompt: Any, sampling_params: Any) -> Any:
        seen.append(dict(sampling_params.extra_args))
        yield SimpleNamespace(kv_transfer_params=None)

    generate = note_receipts(engine)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == body
        if is_lazy:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(0 if asks is None else 2):  # prompts
            args = {"morphserve_receipt": True, **({"morphserve_max_level": 0} if asks else {})}
            async for _ in generate("", SamplingParams(extra_args=args)):
                pass
        if not is_lazy:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a part", "more_body": True})
        counts.append(sys.getrefcount(body))

    async def receive() -> Any:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        pass

    counts = [sys.getrefcount(body)]
    asyncio.run(ReceiptDoor(app, door)({"type": "http", "method": "POST"}, receive, send))
    assert counts[1] == counts[0]
    assert [marks.get(MODEL_ARG) for marks in seen] == {True: 2 * ["exact"], False: 2 * [None], None: []}[asks]


def test_what_is_the_doors_stands_in_no_status() -> None:
    """Guards: digests of keys in a status that others may see; a door that is told nothing by the poll, or that stays
    shut when the engine is silent."""
    said = [{**status(2, keys={KEY: 0}), "engine": 0, "max_queued_tokens": None}]

    async def call(method: str, *args: Any) -> list[Any]:
        return [dict(one) for one in said]

    endpoint = endpoint_of(call)
    (shown,) = asyncio.run(endpoint.look())
    assert "floors" not in shown and endpoint._poll.last == [shown]
    served = Served(endpoint._floors)
    assert served.ask(0).status_code == 503
    endpoint._tell([])
    assert served.ask(0).status_code == 200
