"""What is often asked is answered ahead of vLLM's routes, and otherwise as by them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cpu.watched import recorded
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from seams.asked import ADMIN, LOCAL, READ, bearer, client_of, endpoint_of
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.entrypoints.launchers.app import build_app
from vllm.utils.argparse_utils import FlexibleArgumentParser

from morphserve.integration.server.routes import Access, Shortcut
from morphserve.integration.server.routes.shortcut import _PATHS

OUTSIDE = ("192.0.2.7", 50000)
seen_by_operator: list[str] = []


class OperatorsDoor:
    """Middleware of an operator's, as `--middleware` names it."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen_by_operator.append(scope["path"])
        await self._app(scope, receive, send)


def server_of(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """An API server as vLLM builds one, with our plugin, and an operator's middleware."""
    monkeypatch.setattr("vllm.plugins.load_endpoint_plugins", lambda tasks: [endpoint])
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--middleware", f"{__name__}.OperatorsDoor"])
    return build_app(args, ("generate",))


async def takes_all(method: str, *args: Any) -> list[Any]:
    return [{"ok": True, "engine": 0, "outcome": "unchanged", "error": None, "kind": "slo", "changed": []}]


@pytest.mark.parametrize("path", _PATHS)
@pytest.mark.parametrize(
    ("token", "peer", "is_up", "code"),
    [(ADMIN, LOCAL, True, 200), ("none-of-ours", OUTSIDE, True, 401), (ADMIN, OUTSIDE, False, 503)],
)
def test_both_ways_say_the_same(
    path: str, token: str, peer: Any, is_up: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: an answer without vLLM's form of an error, or other headers, where a question goes the short way."""

    async def gone(method: str, *args: Any) -> list[Any]:
        return []

    endpoint = endpoint_of(takes_all if is_up else gone, Access(ADMIN, READ), [recorded("calm")] * is_up)
    client = TestClient(server_of(endpoint, monkeypatch), base_url="http://127.0.0.1:8000", client=peer)
    method = "POST" if path == "/reload" else "GET"
    short, long = (
        client.request(method, f"/morphserve{path}{query}", headers=bearer(token)) for query in ("", "?the=long-way")
    )
    assert short.status_code == long.status_code == code
    assert short.json().keys() == long.json().keys()
    assert {**short.json(), "age_s": 0} == {**long.json(), "age_s": 0}
    kept = [{k: v for k, v in each.headers.items() if k != "content-length"} for each in (short, long)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("path", ["/status", "/view", "/admin/state", "/reload"])
def test_only_the_operator_stands_before_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a question that vLLM counts and times as it does requests; one that no middleware of an operator sees."""
    registry = CollectorRegistry()
    monkeypatch.setattr("vllm.entrypoints.serve.instrumentator.metrics.get_prometheus_registry", lambda: registry)

    def counted() -> float:
        labels = {"handler": f"/morphserve{path}", "method": method, "status": "2xx"}
        return registry.get_sample_value("http_requests_total", labels) or 0.0

    method = "POST" if path == "/reload" else "GET"
    endpoint = endpoint_of(takes_all, Access(ADMIN, READ), [recorded("calm")])
    client = TestClient(server_of(endpoint, monkeypatch), base_url="http://127.0.0.1", client=LOCAL)
    seen_by_operator.clear()
    assert client.request(method, f"/morphserve{path}", headers=bearer()).is_success
    assert counted() == 0
    assert client.request(method, f"/morphserve{path}?the=long-way", headers=bearer()).is_success
    assert counted() == 1, "the long way is not counted either, so this test proves nothing"
    assert seen_by_operator == [f"/morphserve{path}"] * 2


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("POST", "/status", 405),
        ("GET", "/reload", 405),
        ("GET", "/status?engine=7", 404),
        ("GET", "/status?engine=x", 422),
        ("GET", "/statu", 404),
        ("GET", "", 200),
    ],
)
def test_all_else_goes_the_long_way(method: str, path: str, code: int) -> None:
    """Guards: a method or a query that the short way takes no notice of."""
    client = client_of(endpoint_of(access=Access(ADMIN, READ), statuses=[recorded("calm")]))
    assert client.request(method, f"/morphserve{path}", headers=bearer()).status_code == code


def test_what_is_no_request_passes() -> None:
    """Guards: a server that does not start, because its own first event has no method."""
    passed: list[Any] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["type"])

    app = FastAPI()
    endpoint_of().attach_router(app)
    (kwargs,) = (each.kwargs for each in app.user_middleware if each.cls is Shortcut)
    asyncio.run(Shortcut(behind, **kwargs)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert passed == ["lifespan"]
