"""An API server with our routes in front of engines that a test answers for, and who asks it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

from morphserve.integration.server.metrics import MorphServeEndpoint
from morphserve.integration.server.routes.access import Access

ADMIN, READ = "an-admin-of-tests", "a-reader-of-tests"
LOCAL = ("127.0.0.1", 50000)
Call = Callable[..., Awaitable[list[Any]]]


def bearer(token: str = ADMIN) -> dict[str, str]:
    """The headers of somebody who may change something."""
    return {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}


async def nobody(method: str, *args: Any) -> list[Any]:
    raise AssertionError(f"an engine was asked for {method}")


def endpoint_of(
    call: Call = nobody, access: Access | None = None, statuses: list[dict[str, Any]] | None = None
) -> MorphServeEndpoint:
    """The plugin after its start, with what the last poll has found."""
    endpoint = MorphServeEndpoint()
    endpoint._client = SimpleNamespace(engine_core=SimpleNamespace(call_utility_all_async=call))
    endpoint._access = access or Access()
    told(endpoint, statuses or [], time.monotonic())
    return endpoint


def told(endpoint: MorphServeEndpoint, statuses: list[dict[str, Any]], asked_s: float) -> None:
    """The poll has asked at that time, and was answered so."""
    endpoint._poll.last, endpoint._poll._heard_s = statuses, asked_s


def app_of(endpoint: MorphServeEndpoint) -> FastAPI:
    app = FastAPI()
    endpoint.attach_router(app)
    return app


def client_of(
    endpoint: MorphServeEndpoint, peer: tuple[str, int] = LOCAL, url: str = "http://127.0.0.1:8000", **more: Any
) -> TestClient:
    """Somebody who asks from `peer`, for a server by that name."""
    return TestClient(app_of(endpoint), base_url=url, client=peer, **more)
