"""The routes of an operator: state, orders and their refusals, in front of controllers of replicas."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from seams.asked import ADMIN, LOCAL, READ, app_of, bearer, client_of, endpoint_of

from morphserve.control import ORDERS, Controller
from morphserve.integration.engine import wiring
from morphserve.integration.engine.hooks import Morph
from morphserve.integration.server.metrics import MorphServeEndpoint
from morphserve.integration.server.routes import admin_api, body, reload_api
from morphserve.integration.server.routes.access import Access
from tests.fakes import Rig

BOTH = Access(ADMIN, READ)


class Replicas:
    """Engines of real controllers, without vLLM; each makes a step whenever it is asked for its status."""

    def __init__(self, count: int = 1) -> None:
        self.rigs = [Rig() for _ in range(count)]
        self.cores = [SimpleNamespace(scheduler=SimpleNamespace(morph=self._morph(i))) for i in range(count)]
        self.calls: list[str] = []
        self.sent: list[str] = []

    def _morph(self, index: int) -> Morph:
        morph = object.__new__(Morph)
        morph.runtime = SimpleNamespace(index=index)  # type: ignore[assignment]
        morph.controller = self.rigs[index].controller
        return morph

    async def call(self, method: str, *args: Any) -> list[Any]:
        self.calls.append(method)
        if method == "morphserve_status":
            return [self._status(index) for index in range(len(self.rigs))]
        if method == "morphserve_reload":
            self.sent += [] if args[2] else [args[1]]
            return [{"ok": True, "outcome": "ok", "error": None, "engine": i} for i in range(len(self.rigs))]
        assert method == "morphserve_order"
        return [wiring._order(core, *args) for core in self.cores]

    def _status(self, index: int) -> dict[str, Any]:
        rig = self.rigs[index]
        rig.step(30)
        status = rig.controller.status()
        policy = {"source": "a", "last_error": None, "serves": "aa"}
        return {**status, "engine": index, "num_running": len(rig.pool.held), "num_waiting": 0, "policy": policy}

    def endpoint(self) -> MorphServeEndpoint:
        endpoint = endpoint_of(self.call, BOTH)
        asyncio.run(endpoint.look())
        return endpoint


def operator_of(replicas: Replicas, token: str = ADMIN) -> TestClient:
    return client_of(replicas.endpoint(), headers=bearer(token))


def revision_of(client: TestClient) -> int:
    return int(client.get("/morphserve/admin/state").json()["revision"])


def order(client: TestClient, action: str, **body: Any) -> Any:
    return client.post(f"/morphserve/admin/{action}", json={"revision": revision_of(client), **body})


@pytest.mark.parametrize("count", [1, 2])
def test_an_order_reaches_every_engine_and_is_answered_with_what_is_in_force(count: int) -> None:
    """Guards: one of two replicas that is told nothing; an answer before the order; a state that is half a second
    old, so that the next order names a passed revision."""
    replicas = Replicas(count)
    client = operator_of(replicas)
    done = order(client, "pin", level=3, for_s=60, cause="release test")
    assert done.status_code == 200 and done.json()["ok"] and done.json()["error"] is None
    for engine, rig in zip(done.json()["engines"], replicas.rigs, strict=True):
        assert engine["order"]["kind"] == "pin" and engine["order"]["cause"] == "release test"
        assert rig.controller.level == 3 == engine["level"]
    assert revision_of(client) == done.json()["revision"]
    assert order(client, "resume").status_code == 200
    assert [engine["order"] for engine in client.get("/morphserve/admin/state").json()["engines"]] == count * [None]


def test_a_passed_revision_is_a_409_that_says_the_one_in_force() -> None:
    """Guards: an order that is sent twice, or of an operator who has not seen what another has ordered."""
    replicas = Replicas(2)
    client = operator_of(replicas)
    sent = {"revision": revision_of(client), "level": 1, "for_s": 60}
    assert client.post("/morphserve/admin/pin", json=sent).status_code == 200
    again = client.post("/morphserve/admin/pin", json=sent)
    assert again.status_code == 409 and not again.json()["ok"] and again.json()["revision"] == revision_of(client)
    assert again.json()["engines"][1]["order"]["level"] == 1
    assert replicas.calls.count("morphserve_order") == 3, "a rehearsal, then the first engine, then the other"


def test_engines_take_an_order_together_or_not_at_all() -> None:
    """Guards: one replica pinned and the other not, because it alone refuses."""
    replicas = Replicas(2)
    replicas.rigs[1].script.max_level = 1
    client = operator_of(replicas)
    done = order(client, "pin", level=3, for_s=60)
    assert done.status_code == 422 and "level 3 is beyond level 1" in done.json()["error"]
    assert [engine["order"] for engine in done.json()["engines"]] == [None, None]


def test_a_drain_shuts_vllms_door_with_its_answer_and_says_when_it_is_empty() -> None:
    """Guards: requests that a drained server takes for half a second more; one that is restarted under its requests."""
    replicas = Replicas(2)
    endpoint = replicas.endpoint()
    put: list[Any] = []
    endpoint._queue_limit = SimpleNamespace(apply=put.append)  # type: ignore[assignment]
    client = client_of(endpoint, headers=bearer())
    assert replicas.rigs[0].pool.allocate(7, 2)
    done = order(client, "drain", cause="kernel update").json()
    assert put[-1] == [0, 0] and [engine["drained"] for engine in done["engines"]] == [False, True]
    replicas.rigs[0].pool.finish(7)
    asyncio.run(endpoint.look())
    state = client.get("/morphserve/admin/state").json()
    assert [engine["drained"] for engine in state["engines"]] == [True, True]
    assert order(client, "resume").status_code == 200 and put[-1] == [None, None]


def test_a_reload_is_an_order_like_the_others() -> None:
    """Guards: a reload that needs no revision, so that one that was recorded reloads again."""
    replicas = Replicas()
    client = operator_of(replicas)
    named = revision_of(client)
    policy = {"kind": "static", "level": 1}
    for content, expected in (({}, ""), ({"policy": policy}, '{"policy": {"kind": "static", "level": 1}}')):
        assert order(client, "reload", **content).status_code == 200 and replicas.sent[-1] == expected
    assert client.post("/morphserve/admin/reload", json={"revision": named}).status_code == 409
    assert len(replicas.sent) == 2


@pytest.mark.parametrize("when", ["rehearsal", "reload"])
def test_a_reload_that_is_refused_is_said(when: str) -> None:
    """Guards: an operator who is told that his policy is in force, which an engine has refused; one replica that has
    taken it; an order that counts as taken, and passes a revision, before anybody knows whether its policy is."""
    replicas = Replicas(2)

    async def call(method: str, *args: Any) -> list[Any]:
        answers = await replicas.call(method, *args)
        if method == "morphserve_reload" and args[2] == (when == "rehearsal"):
            return [answers[0], {"ok": False, "outcome": "refused", "error": "no such level", "engine": 1}]
        return answers

    endpoint = replicas.endpoint()
    endpoint._client.engine_core.call_utility_all_async = call
    client = client_of(endpoint, headers=bearer())
    before = revision_of(client)
    done = order(client, "reload")
    assert done.status_code == 422 and not done.json()["ok"] and done.json()["error"] == "no such level"
    counts = [rig.controller.counters.orders for rig in replicas.rigs]
    if when == "rehearsal":
        assert counts == [{}, {"reload_refused": 1}] and revision_of(client) == before and len(replicas.sent) == 0
    else:  # what it had found before is another: as rare as a file that is written in that moment
        assert counts == [{"reload_taken": 1}, {"reload_taken": 1, "reload_refused": 1}]


def test_a_drained_server_is_at_level_0() -> None:
    """Guards: a server called empty that still holds what it took from its layers, or in mid-transition."""
    status = {**dict.fromkeys(admin_api._SHOWN, 0), "orders": {"revision": 1, "order": {"kind": "drain"}}}
    for level, kind, is_empty in ((2, "drain", False), (0, "drain", True), (0, "pin", False)):
        told = {**status, "exposure_level": level, "orders": {"revision": 1, "order": {"kind": kind}}}
        assert admin_api.state_of([told])["engines"][0]["drained"] is is_empty


@pytest.mark.parametrize("action", ORDERS)
def test_to_look_is_not_to_order(action: str) -> None:
    """Guards: the token to read orders something; an order without one, of a page, or of no known kind."""
    replicas = Replicas()
    client = client_of(replicas.endpoint())
    body = {"revision": 1, "level": 1, "for_s": 1}
    path = f"/morphserve/admin/{action}"
    assert client.post(path, json=body, headers={"Authorization": f"Bearer {READ}"}).status_code == 401
    assert client.post(path, json=body).status_code == 401
    assert client.post(path, json=body, headers={**bearer(), "Origin": "http://127.0.0.1:8000"}).status_code == 403
    assert client.post(path, content="{}", headers={**bearer(), "Content-Type": "text/plain"}).status_code == 415
    assert client.get(path, headers=bearer()).status_code == 405
    assert replicas.calls == ["morphserve_status"]
    assert client.get("/morphserve/admin/state", headers=bearer(READ)).status_code == 200
    assert client.get("/morphserve/admin/state").status_code == 401
    assert client.post("/morphserve/admin/format", json=body, headers=bearer()).status_code == 404
    nobody = client_of(endpoint_of(replicas.call, Access()), LOCAL)
    assert nobody.post(path, json=body, headers=bearer()).status_code == 403


def test_without_a_token_the_state_is_without_what_its_operator_wrote() -> None:
    """Guards: a cause, which may name a customer, for every process of the machine."""
    replicas = Replicas()
    order(operator_of(replicas), "pin", level=1, for_s=60, cause="swordfish")
    bare = endpoint_of(replicas.call, Access())
    asyncio.run(bare.look())
    for path in ("/morphserve/admin/state", "/morphserve/status", "/morphserve/view"):
        said = client_of(bare).get(path)
        assert said.status_code == 200 and "swordfish" not in said.text and "pin" in said.text


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"x" * 4097, 413),
        (b'{"revision": 1, "cause": "' + b"x" * 4000 + b'"}', 422),
        (b"[" * 4096, 422),
        (b"\xff", 422),
        (b"{}", 422),
        (b"", 422),
    ],
)
def test_a_body_out_of_bounds_reaches_no_engine(content: bytes, status: int) -> None:
    """Guards: a body that fills the memory of the API server, or whose nesting keeps it busy."""
    replicas = Replicas()
    client = operator_of(replicas)
    done = client.post("/morphserve/admin/drain", content=content)
    assert done.status_code == status and "\n" not in done.json()["detail"]
    assert "morphserve_order" not in replicas.calls


def test_an_order_at_a_time() -> None:
    """Guards: two operators at once, of whom each is told that his order is in force."""
    replicas = Replicas()

    async def both() -> list[int]:
        going, asked = asyncio.Event(), asyncio.Event()

        async def call(method: str, *args: Any) -> list[Any]:
            asked.set()
            await going.wait()
            return await replicas.call(method, *args)

        endpoint = endpoint_of(call, BOTH)
        transport = httpx.ASGITransport(app_of(endpoint))
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=bearer()) as client:
            named = replicas.rigs[0].controller.status()["orders"]["revision"]
            first = asyncio.create_task(client.post("/morphserve/admin/drain", json={"revision": named}))
            await asked.wait()
            second = await client.post("/morphserve/admin/resume", json={"revision": named})
            going.set()
            return [(await first).status_code, second.status_code]

    assert asyncio.run(both()) == [200, 429]


def test_of_two_api_servers_orders_at_once_one_is_taken_everywhere() -> None:
    """Guards: two operators at two API servers, each of whom has one replica and is told that he has none; a server
    that goes on to show the revision before."""
    replicas = Replicas(2)
    rehearsed = asyncio.Barrier(2)

    def server(is_second: bool) -> MorphServeEndpoint:
        """One whose commands reach the engines in an order of its own, as sockets have none between them."""

        async def call(method: str, *args: Any) -> list[Any]:
            if method != "morphserve_order":
                return await replicas.call(method, *args)
            is_rehearsal, answers = args[3], {}
            if is_rehearsal:
                await rehearsed.wait()
            for index in (1, 0) if is_second else (0, 1):
                answers[index] = wiring._order(replicas.cores[index], *args)
                await asyncio.sleep(0)
            return [answers[0], answers[1]]

        return endpoint_of(call, BOTH)

    async def both() -> list[Any]:
        servers = [server(False), server(True)]
        named = sum(rig.controller.status()["orders"]["revision"] for rig in replicas.rigs)
        clients = [
            httpx.AsyncClient(transport=httpx.ASGITransport(app_of(one)), base_url="http://x", headers=bearer())
            for one in servers
        ]
        body = {"revision": named, "for_s": 60}
        sent = [
            client.post("/morphserve/admin/pin", json={**body, "level": level})
            for client, level in zip(clients, (1, 3), strict=True)
        ]
        done = await asyncio.gather(*sent)
        for one in servers:
            await one.look()
        return [*done, *[(await client.get("/morphserve/admin/state")).json() for client in clients]]

    first, second, *states = asyncio.run(both())
    assert sorted((first.status_code, second.status_code)) == [200, 409]
    taken = 1 if first.status_code == 200 else 3
    assert [rig.controller.level for rig in replicas.rigs] == [taken, taken]
    (done,) = (one for one in (first, second) if one.status_code == 200)
    assert states[0]["revision"] == states[1]["revision"] == done.json()["revision"]


def test_an_engine_that_hangs_is_said_and_takes_nothing_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a request that waits for ever; a pin that comes into force an hour after its operator has given up."""
    replicas = Replicas()
    endpoint = replicas.endpoint()
    client = client_of(endpoint, headers=bearer())
    named = revision_of(client)

    async def hang(method: str, *args: Any) -> list[Any]:
        await asyncio.Event().wait()
        return []

    endpoint._client.engine_core.call_utility_all_async = hang
    monkeypatch.setattr(admin_api, "_TIMEOUT_S", 0.01)
    done = client.post("/morphserve/admin/drain", json={"revision": named})
    assert done.status_code == 504 and "has not answered" in done.json()["detail"]
    (core,) = replicas.cores
    engine_revision = replicas.rigs[0].controller.status()["orders"]["revision"]
    text = f'{{"revision": {named}}}'
    late = wiring._order(core, "drain", text, [[0, engine_revision]], False, time.time() - 1)
    assert late is not None and (late["ok"], late["outcome"]) == (False, "late")
    assert isinstance(replicas.rigs[0].controller, Controller)
    assert replicas.rigs[0].controller.status()["orders"]["order"] is None


def test_an_engine_that_hangs_with_an_order_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an engine that has told its status and then hangs: its operator waits for ever, or it takes the order
    when nobody waits any more."""
    replicas = Replicas()
    endpoint = replicas.endpoint()
    client = client_of(endpoint, headers=bearer())
    named, limits = revision_of(client), []

    async def hang(method: str, *args: Any) -> list[Any]:
        if method == "morphserve_order":
            limits.append(args[-1] - time.time())
            await asyncio.Event().wait()
        return await replicas.call(method, *args)

    endpoint._client.engine_core.call_utility_all_async = hang
    monkeypatch.setattr(admin_api, "_TIMEOUT_S", 0.05)
    done = client.post("/morphserve/admin/drain", json={"revision": named})
    assert done.status_code == 504 and "has not answered" in done.json()["detail"]
    assert len(limits) == 1 and limits[0] < 1.0


@pytest.mark.parametrize("limit_s", [0.01, 0.02])
@pytest.mark.parametrize("action", ["drain", "reload"])
def test_who_hangs_is_said_with_how_long_was_waited(
    action: str, limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: ten seconds in the answer to an order that has waited a minute for a file to be read."""
    replicas = Replicas()

    async def call(method: str, *args: Any) -> list[Any]:
        if (method == "morphserve_reload") == (action == "reload") and method != "morphserve_status":
            await asyncio.Event().wait()
        return await replicas.call(method, *args)

    client = client_of(endpoint_of(call, BOTH), headers=bearer())
    monkeypatch.setattr(reload_api, "_TIMEOUT_S", limit_s if action == "reload" else 60.0)
    monkeypatch.setattr(admin_api, "_TIMEOUT_S", limit_s if action == "drain" else 10.0)
    named = sum(rig.controller.status()["orders"]["revision"] for rig in replicas.rigs)
    done = client.post(f"/morphserve/admin/{action}", json={"revision": named})
    assert done.status_code == 504 and f"for {limit_s} s; look at the state" in done.json()["detail"]


def test_a_stock_engine_takes_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a traceback where the plugin is loaded and not asked for; a body that never comes holds the door."""

    async def stock(method: str, *args: Any) -> list[Any]:
        return [wiring._order(SimpleNamespace(scheduler=object()), *args)] if args else [None]

    client = client_of(endpoint_of(stock, BOTH), headers=bearer())
    assert client.get("/morphserve/admin/state").status_code == 503
    assert client.post("/morphserve/admin/drain", json={"revision": 1}).status_code == 503
    monkeypatch.setattr(body, "_TIMEOUT_S", 0.0)
    assert client.post("/morphserve/admin/drain", json={"revision": 1}).status_code in (408, 503)
