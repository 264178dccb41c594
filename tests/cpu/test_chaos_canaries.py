"""Canaries of `morphserve chaos`: what a stock server's answer is worth as a reference."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from morphserve.tools.bench import ClientOptions
from morphserve.tools.chaos.load import CanaryAnswer, ask_canary

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(("margins", "is_clear"), [((3.0, 1.0), True), ((3.0, 0.9), False), ((0.0, 3.0), False)])
def test_a_token_that_rounding_may_change_makes_no_reference(margins: Sequence[float], is_clear: bool) -> None:
    """Guards: a canary that accuses a server of what a batch of another shape does to a stock one."""
    asked: list[dict[str, Any]] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(await request.json())
        logprobs = {"top_logprobs": [{"a": -0.1 - margin, "b": -0.1} for margin in margins]}
        return web.json_response({"choices": [{"token_ids": [5, 6], "logprobs": logprobs}]})

    async def ask() -> tuple[CanaryAnswer, CanaryAnswer]:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        async with TestServer(app) as server, aiohttp.ClientSession() as session:
            options = ClientOptions(url=str(server.make_url("")).rstrip("/"), model="m")
            return await ask_canary(session, options, 0, with_margins=True), await ask_canary(session, options, 0)

    known, unknown = asyncio.run(ask())
    assert known.tokens == unknown.tokens == (5, 6) and (known.is_clear, unknown.is_clear) == (is_clear, False)
    assert [each.get("logprobs") for each in asked] == [2, None]
