"""Who may see a server's status and who may change something: by token, by peer, by header."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cpu.watched import recorded
from fastapi import FastAPI, HTTPException, Request
from fastapi.testclient import TestClient
from seams.asked import ADMIN, LOCAL, READ, app_of, bearer, client_of, endpoint_of, told
from starlette.middleware.cors import CORSMiddleware

from morphserve.errors import ConfigError
from morphserve.integration.server import metrics
from morphserve.integration.server.metrics import MorphServeEndpoint
from morphserve.integration.server.routes import access as access_module
from morphserve.integration.server.routes.access import Access

BOTH = Access(ADMIN, READ)
OUTSIDE = ("192.0.2.7", 50000)
READS = ("/morphserve/status", "/morphserve/view")
CHANGES = ("/morphserve/reload",)


@pytest.mark.parametrize("path", CHANGES)
@pytest.mark.parametrize("peer", [LOCAL, OUTSIDE])
@pytest.mark.parametrize("access", [Access(), Access(read=READ)], ids=["no token", "a token to read"])
def test_nothing_can_be_changed_without_a_token_of_ones_own(path: str, peer: Any, access: Access) -> None:
    """Guards: anybody who reaches the port reloads the policy; the right to read is one to change."""
    client = client_of(endpoint_of(access=access), peer)
    for headers in ({"Content-Type": "application/json"}, bearer(READ), bearer("None"), bearer("")):
        done = client.post(path, headers=headers)
        assert done.status_code == 403 and "admin.token_file" in done.json()["detail"]


@pytest.mark.parametrize("path", CHANGES)
@pytest.mark.parametrize(
    "shown", ["", f"Bearer {READ}", f"Basic {ADMIN}", ADMIN, f"Bearer {ADMIN}x", f"Bearer {ADMIN[:-1]}", "Bearer"]
)
def test_only_its_own_token_changes_something(path: str, shown: str) -> None:
    """Guards: a part of a token, or the one to read, taken for it."""
    headers = {"Authorization": shown, "Content-Type": "application/json"}
    done = client_of(endpoint_of(access=BOTH)).post(path, headers=headers)
    assert done.status_code == 401 and done.headers["WWW-Authenticate"] == "Bearer"


def test_who_is_refused_is_told_of_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: somebody who tries tokens unseen, or fills the disk with lines; a token, or a line of his, in the log."""
    lines: list[str] = []
    log = SimpleNamespace(warning=lambda text, *args: lines.append(text % args))
    monkeypatch.setattr(access_module, "logger", log)
    now_s = [1000.0]
    access = Access(ADMIN, READ, access_module.Refusals(lambda: now_s[0]))
    client = client_of(endpoint_of(access=access, statuses=[recorded("calm")]), OUTSIDE)
    assert client.get("/morphserve/status", headers=bearer(READ)).status_code == 200
    assert client.post("/morphserve/reload", headers=bearer() | {"Content-Type": "text/plain"}).status_code == 415
    assert not lines
    for _ in range(30):
        assert client.post("/morphserve/admin/pin", headers=bearer("wrong-token")).status_code == 401
        assert client.get("/morphserve/status", headers={"Origin": "http://a"}).status_code == 403
        now_s[0] += 0.5
    assert len(lines) == 1
    now_s[0] += 60.0
    client.post("/morphserve/admin/pin%0Amorph: all is well", headers=bearer("wrong-token"))
    first, second = lines
    assert "192.0.2.7" in first and "401" in first and "POST /morphserve/admin/pin" in first
    assert "60 requests" in second and "\n" not in second and "wrong" not in first + second


@pytest.mark.parametrize("path", CHANGES)
@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"Origin": "http://127.0.0.1:8000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
    ],
)
def test_no_web_page_changes_something(path: str, more: dict[str, str], status: int) -> None:
    """Guards: a page that an operator has open posts to his server, by a form or past a proxy that adds the token."""
    done = client_of(endpoint_of(access=BOTH)).post(path, headers={**bearer(), **more})
    assert done.status_code == status


@pytest.mark.parametrize("path", READS)
def test_vllms_open_door_to_pages_is_none_to_the_status(path: str) -> None:
    """Guards: vLLM lets every origin read by default, and so a page would read the status of a server on localhost."""
    inside = app_of(endpoint_of(statuses=[recorded("calm")]))
    inside.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    client = TestClient(inside, base_url="http://localhost:8000", client=LOCAL)
    assert client.get(path).status_code == 200
    assert client.get(path, headers={"Origin": "http://elsewhere"}).status_code == 403


@pytest.mark.parametrize(
    ("peer", "url", "headers", "status"),
    [
        (LOCAL, "http://127.0.0.1:8000", {}, 200),
        (LOCAL, "http://localhost", {}, 200),
        (("::1", 1), "http://[::1]:8000", {}, 200),
        (("::ffff:127.0.0.1", 1), "http://localhost:8000", {}, 200),
        (OUTSIDE, "http://127.0.0.1:8000", {}, 403),
        (("::ffff:192.0.2.7", 1), "http://localhost:8000", {}, 403),
        (LOCAL, "http://rebound.example:8000", {}, 403),
        (LOCAL, "http://localhost:8000", {"X-Forwarded-For": "127.0.0.1"}, 403),
        (LOCAL, "http://localhost:8000", {"Forwarded": "for=192.0.2.7"}, 403),
        (LOCAL, "http://localhost:8000", {"Via": "1.1 proxy"}, 403),
        (LOCAL, "http://localhost:8000", {"X-Forwarded-Port": "443"}, 403),
    ],
)
def test_without_a_token_the_status_is_for_this_machine(peer: Any, url: str, headers: Any, status: int) -> None:
    """Guards: the status for everybody; for all the world behind a proxy on this machine; for a page whose own name
    was made to point here."""
    client = client_of(endpoint_of(statuses=[recorded("calm")]), peer, url)
    assert {client.get(path, headers=headers).status_code for path in READS} == {status}


@pytest.mark.parametrize(("version", "may"), [("1.0", False), ("1.1", True), ("2", True)])
def test_a_proxy_that_adds_no_header_is_none_of_this_machine(version: str, may: bool) -> None:
    """Guards: the status for all the world behind nginx as it is installed, which says of itself nothing but that."""
    headers = [(b"host", b"127.0.0.1:8000")]
    asked = {"method": "GET", "path": "/morphserve/status", "query_string": b"", "headers": headers}
    scope = {"type": "http", "http_version": version, "client": LOCAL, **asked}
    with nullcontext() if may else pytest.raises(HTTPException) as refused:
        assert Access().check_read(Request(scope)) is False
    assert refused is None or refused.value.status_code == 403


@pytest.mark.parametrize(
    ("access", "token", "status"),
    [
        (BOTH, ADMIN, 200), (BOTH, READ, 200), (BOTH, "", 401), (BOTH, "another-one-of-tests", 401),
        (Access(admin=ADMIN), ADMIN, 200), (Access(admin=ADMIN), "", 401), (Access(read=READ), "", 401),
    ],
)  # fmt: skip
@pytest.mark.parametrize("peer", [LOCAL, OUTSIDE])
def test_with_a_token_it_is_for_who_shows_one(access: Access, token: str, status: int, peer: Any) -> None:
    """Guards: a token that a proxy on the same machine makes void; the admin who cannot look."""
    client = client_of(endpoint_of(access=access, statuses=[recorded("calm")]), peer)
    assert {client.get(path, headers=bearer(token)).status_code for path in READS} == {status}


def test_what_files_say_is_for_who_shows_a_token() -> None:
    """Guards: where files lie, and what stands in them, for every process of a shared machine."""
    status = recorded("restored")
    status["policy"] = {**status["policy"], "source": "/home/me/morph.yaml", "last_error": "swordfish"}
    status["prepare"] = {"state": "off", "part": "", "note": "/home/me/model: swordfish", "begins_in_s": None}
    status["recent_transitions"] = [{**status["recent_transitions"][0], "outcome": "aborted", "error": "swordfish"}]
    bare = client_of(endpoint_of(statuses=[status]))
    for path in READS:
        said = bare.get(path).text
        assert "swordfish" not in said and "/home/me" not in said and "the server's log says it" in said
    assert bare.get("/morphserve/status").json()["policy"]["source"] == "morph.yaml"
    trusted = client_of(endpoint_of(access=BOTH, statuses=[status]))
    for path in READS:
        assert "swordfish" in trusted.get(path, headers=bearer(READ)).text
    page = trusted.get("/morphserve/status", headers=bearer(READ)).json()
    assert page == {**status, "age_s": page["age_s"]}


def test_the_page_itself_holds_nothing() -> None:
    """Guards: a page that nobody can load, so that nobody can give it a token."""
    page = client_of(endpoint_of(access=BOTH, statuses=[recorded("burst")]), OUTSIDE).get("/morphserve")
    assert page.status_code == 200 and "level 0 of" not in page.text


# ---- the poll


def test_no_question_reaches_an_engine() -> None:
    """Guards: each look at the status is a call on the engine's own thread, at the pace of whoever asks."""
    asked: list[str] = []

    async def call(method: str) -> list[Any]:
        asked.append(method)
        return [recorded("calm")]

    async def poll_once(endpoint: MorphServeEndpoint) -> None:
        task = asyncio.create_task(endpoint._poll.run(lambda statuses: None))
        while not endpoint._poll.last:
            await asyncio.sleep(0)
        task.cancel()

    endpoint = endpoint_of(call)
    client = client_of(endpoint)
    assert client.get("/morphserve/status").status_code == 503
    asyncio.run(poll_once(endpoint))
    for _ in range(50):
        assert {client.get(path).status_code for path in READS} == {200}
    assert asked == ["morphserve_status"]
    expected = {**recorded("calm"), "prepare": None, "age_s": pytest.approx(0, abs=60)}
    assert client.get("/morphserve/status").json() == expected


def test_the_status_says_how_old_it_is() -> None:
    """Guards: figures of an engine that hangs, which look like those of one that is idle."""
    endpoint = endpoint_of()
    now = [100.0]
    endpoint._poll._clock = lambda: now[0]
    told(endpoint, [recorded("calm")], 100.0)
    client = client_of(endpoint)
    for age_s in (0.0, 0.25, 700.0, 800.0):
        now[0] = 100.0 + age_s
        assert [client.get(path).json()["age_s"] for path in READS] == [age_s, age_s]
        assert ("no answer; the figures are" in client.get("/morphserve/view").text) == (age_s > 1)
    assert "figures are 13 min old" in client.get("/morphserve/view").text
    told(endpoint, [recorded("burst")], 899.0)
    status = client.get("/morphserve/status").json()
    assert status["age_s"] == 1.0 and status["exposure_level"] == recorded("burst")["exposure_level"]


def test_a_document_is_written_once_an_answer_and_old_ones_go() -> None:
    """Guards: each look writes the status anew; or an engine that is silent leaves a document a second of it."""
    endpoint, now, made = endpoint_of(), [100.0], []
    endpoint._poll._clock = lambda: now[0]
    told(endpoint, [recorded("calm")], 100.0)

    def make(age_s: float) -> dict[str, Any]:
        made.append(age_s)
        return {"level": 0}

    for _ in range(50):
        assert endpoint._last.document("status", make).body == b'{"age_s":0.000,"level":0}'
    assert made == [0.0]
    for second in range(10, 1010):
        now[0] = 100.0 + second
        endpoint._last.document("status", make)
    assert len(made) == 1001 and len(endpoint._last._written) <= 64


# ---- from the settings


def started(admin: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Access:
    """The rule of a server with these settings."""

    async def nothing(method: str, *args: Any) -> list[Any]:
        return []

    async def start() -> Access:
        endpoint = MorphServeEndpoint()
        endpoint.attach_router(FastAPI())
        engine = SimpleNamespace(
            vllm_config=SimpleNamespace(additional_config={"morphserve": {"admin": admin}}),
            engine_core=SimpleNamespace(call_utility_all_async=nothing),
        )
        await endpoint.init_state(engine, None, None)  # type: ignore[arg-type]
        assert endpoint._tasks
        for task in endpoint._tasks:
            task.cancel()
        return endpoint._access

    monkeypatch.setattr(metrics, "add_to_own", lambda collector: None)
    monkeypatch.setattr(metrics, "on_hangup", lambda ask, tasks: False)
    return asyncio.run(start())


def test_tokens_come_from_the_files_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a token that is set and not asked for; one taken for the other; a file that others can read."""
    files = {}
    for key, token in (("token_file", ADMIN), ("read_token_file", READ)):
        files[key] = tmp_path / key
        files[key].write_text(token + "\n")
        files[key].chmod(0o600)
    named = {key: str(file) for key, file in files.items()}
    assert started({}, monkeypatch) == Access()
    assert started(named, monkeypatch) == BOTH
    assert started({"read_token_file": named["read_token_file"]}, monkeypatch) == Access(read=READ)
    files["token_file"].chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644"):
        started(named, monkeypatch)
