"""How an operator asks for a reload: by SIGHUP, by POST, and what vLLM makes of the engine's answer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvloop
from fastapi import HTTPException, Request
from fastapi.testclient import TestClient
from seams.asked import ADMIN, app_of, bearer, client_of, endpoint_of
from seams.logged import records_of
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import UtilityOutput
from vllm.v1.engine.core import EngineCoreProc

from morphserve.integration.engine import wiring as engine
from morphserve.integration.engine.hooks import Morph
from morphserve.integration.server.routes import reload_api
from morphserve.integration.server.routes.access import Access
from morphserve.integration.server.routes.body import text_of
from morphserve.integration.server.routes.reload_api import _LASTING_LOOKS, Sameness, on_hangup
from morphserve.integration.server.tasks import Tasks
from morphserve.integration.start.hangup import _IGNORED_BY, hangup_is_free, ignore_hangups
from morphserve.integration.start.settings import config_file
from morphserve.plugin import register

POLICY = b'{"policy": {"kind": "static"}}'


def answer(index: int, error: str | None = None) -> dict[str, Any]:
    outcome = "ok" if error is None else "refused"
    told = {"ok": error is None, "outcome": outcome, "error": error, "kind": "static", "changed": None}
    return {**told, "serves": "aa", "engine": index}


def operator_of(answers: list[Any], sent: list[str] | None = None) -> TestClient:
    """Somebody who shows the token, to engines that answer so."""

    async def call(method: str, cause: str, text: str, is_rehearsal: bool) -> list[Any]:
        assert (method, cause) == ("morphserve_reload", "POST /morphserve/reload")
        if sent is not None and not is_rehearsal:
            sent.append(text)
        return answers

    return client_of(endpoint_of(call, Access(admin=ADMIN)), headers=bearer())


def test_post_says_what_came_of_it() -> None:
    """Guards: a refused file with status 200, an answer of one replica for all, or none without the plugin."""
    done = operator_of([answer(0)]).post("/morphserve/reload")
    assert done.status_code == 200
    assert done.json() == {"ok": True, "outcome": "ok", "error": None, "kind": "static", "changed": None}
    half = operator_of([answer(1, "no such level"), answer(0)]).post("/morphserve/reload")
    assert half.status_code == 422 and not half.json()["ok"] and half.json()["error"] == "no such level"
    assert [each["ok"] for each in half.json()["engines"]] == [True, False]
    assert operator_of([None]).post("/morphserve/reload").status_code == 503
    assert operator_of([answer(0)]).get("/morphserve/reload").status_code == 405


def test_replicas_take_what_is_sent_together_or_not_at_all() -> None:
    """Guards: one policy in one replica and another in the other, as one has refused what was sent."""
    sent: list[str] = []
    one_refuses = operator_of([answer(0), answer(1, "gave up")], sent)
    done = one_refuses.post("/morphserve/reload", content=POLICY)
    assert done.status_code == 422 and done.json()["error"] == "gave up" and sent == []
    assert [each["ok"] for each in done.json()["engines"]] == [True, False], "which of them"
    assert operator_of([answer(0), answer(1)], sent).post("/morphserve/reload", content=POLICY).status_code == 200
    assert sent == [POLICY.decode()]


def test_replicas_that_serve_different_policies_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a file that one replica has refused and the other taken, and nobody who is told; a line a poll, or one
    for an edit that is on its way round."""
    caplog.set_level("INFO", "vllm.morphserve")
    sameness = Sameness()

    def look(*serves: str) -> None:
        sameness.look([{"engine": i, "policy": {"serves": digest}} for i, digest in enumerate(serves)])

    for lasts, lines in ((_LASTING_LOOKS - 1, 0), (3 * _LASTING_LOOKS, 2)):
        for _ in range(lasts):
            look("aa", "bb")
        look()  # silent for a moment: nobody knows
        look("bb", "bb")
        told = [record.getMessage() for record in records_of(caplog)]
        assert len(told) == lines
    assert "engine 0 aa, engine 1 bb" in told[0] and "the same policy again" in told[1]


def test_one_reload_at_a_time_and_the_others_are_told_so() -> None:
    """Guards: a queue without bound of reloads, each of which parses a file in the engine."""
    asked: list[str] = []

    async def flood() -> list[int]:
        going = asyncio.Event()

        async def call(method: str, *args: str) -> list[Any]:
            asked.append(method)
            await going.wait()
            return [answer(0)]

        transport = httpx.ASGITransport(app_of(endpoint_of(call, Access(admin=ADMIN))))
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=bearer()) as client:
            first = asyncio.create_task(client.post("/morphserve/reload"))
            while not asked:
                await asyncio.sleep(0)
            others = [await client.post("/morphserve/reload") for _ in range(20)]
            assert {other.headers["Retry-After"] for other in others} == {"1"}
            going.set()
            return [(await first).status_code, *(other.status_code for other in others)]

    assert asyncio.run(flood()) == [200] + 20 * [429] and len(asked) == 1
    busy = {**answer(0), "ok": False, "outcome": "busy"}
    assert operator_of([busy]).post("/morphserve/reload").status_code == 429, "one that SIGHUP has asked for"
    assert operator_of([answer(0)]).post("/morphserve/reload").status_code == 200


def test_an_engine_that_answers_no_reload_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an engine that hangs keeps whoever asks waiting for ever, and all others out."""

    async def hang(method: str, *args: Any) -> list[Any]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(reload_api, "_TIMEOUT_S", 0.01)
    client = client_of(endpoint_of(hang, Access(admin=ADMIN)), headers=bearer())
    for _ in range(2):
        done = client.post("/morphserve/reload")
        assert done.status_code == 504 and "has not answered" in done.json()["detail"]


def test_a_body_reaches_the_engines_whole_or_not_at_all() -> None:
    """Guards: a policy that is cut, or that nobody gets; a body that fills the memory of the API server."""
    sent: list[str] = []
    client = operator_of([answer(0)], sent)
    longest = POLICY.ljust(65_536)
    for body in (POLICY, b" \n", b"", longest):
        assert client.post("/morphserve/reload", content=body).status_code == 200
    assert client.post("/morphserve/reload", json={}).status_code == 200
    assert sent == [POLICY.decode(), "", "", longest.decode(), ""]
    for body, status in ((longest + b" ", 413), ((b"x" * 1024 for _ in range(65)), 413), (b"\xff", 422)):
        done = client.post("/morphserve/reload", content=body)
        assert done.status_code == status and "\n" not in done.json()["detail"]
    assert len(sent) == 5


def test_a_body_without_an_end_is_not_read_for_ever() -> None:
    """Guards: a limit that is looked at once all is there, when the memory of the API server is full."""
    received: list[int] = []

    async def receive() -> dict[str, Any]:
        received.append(1024)
        return {"type": "http.request", "body": b"x" * 1024, "more_body": len(received) < 1000}

    with pytest.raises(HTTPException, match="413"):
        asyncio.run(text_of(Request({"type": "http"}, receive), 65_536))
    assert sum(received) == 65_536 + 1024


def test_a_body_that_does_not_come_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: who sends a byte a minute is the one reload under way, and nobody else's comes through."""
    monkeypatch.setattr("morphserve.integration.server.routes.body._TIMEOUT_S", 0.0)

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(HTTPException, match="408"):
        asyncio.run(text_of(Request({"type": "http"}, receive), 65_536))


# ---- SIGHUP


@pytest.fixture
def hangup() -> Iterator[None]:
    """A test that fails must not leave a handler to the others."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("fails", [False, True])
def test_hangup_asks_the_engines(
    run: Callable[[Any], Any], fails: bool, hangup: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a server that SIGHUP ends, or that hears it once; an operator who never learns what came of it."""
    causes: list[str] = []
    told: list[str] = []

    async def serve() -> None:
        asked = asyncio.Event()

        def tell(text: str, *args: Any) -> None:
            told.append(text % args)
            asked.set()

        monkeypatch.setattr(reload_api, "logger", SimpleNamespace(info=tell, error=tell))

        async def ask(cause: str) -> list[Any]:
            causes.append(cause)
            if fails:
                raise RuntimeError("the engine is dead")
            return [answer(0), answer(1, "refused")]

        assert on_hangup(ask, Tasks())
        for _ in range(2):
            asked.clear()
            signal.raise_signal(signal.SIGHUP)
            await asyncio.wait_for(asked.wait(), 30)

    run(serve())
    assert causes == ["SIGHUP", "SIGHUP"]
    if fails:
        assert told == ["morphserve: SIGHUP reached no engine (RuntimeError: the engine is dead); the policy stays"] * 2
    else:
        assert told == [f"morphserve: SIGHUP, engine {at}" for at in ("0: ok", "1: refused")] * 2


@pytest.mark.parametrize("theirs", [signal.SIG_IGN, lambda number, frame: None], ids=["nohup", "handled"])
def test_handler_of_somebody_else_stays(theirs: Any, hangup: None) -> None:
    """Guards: nohup undone, or another package's handler lost."""
    signal.signal(signal.SIGHUP, theirs)

    async def serve() -> bool:
        return on_hangup(None, Tasks())  # type: ignore[arg-type]

    assert not asyncio.run(serve())
    assert signal.getsignal(signal.SIGHUP) is theirs


@pytest.mark.parametrize("context", [UsageContext.OPENAI_API_SERVER, UsageContext.LLM_CLASS])
def test_a_server_and_what_it_starts_ignore_hangups(
    context: UsageContext, hangup: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Guards: a closed terminal, which sends SIGHUP to all of a server's processes, ends its engine cores and workers;
    a script that makes an engine of its own survives its terminal."""
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", torch_dtype="bfloat16", hidden_size=64)
    config |= dict(num_attention_heads=4, num_hidden_layers=2, intermediate_size=128, vocab_size=256)
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv(_IGNORED_BY, "")
    register()
    args = EngineArgs(str(tmp_path), skip_tokenizer_init=True, max_model_len=256, additional_config={"morphserve": {}})
    args.create_engine_config(context)
    is_server = context is UsageContext.OPENAI_API_SERVER
    assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if is_server else signal.SIG_DFL)
    code = "import signal; signal.raise_signal(signal.SIGHUP)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == (0 if is_server else -signal.SIGHUP)


@pytest.mark.parametrize("theirs", [signal.SIG_IGN, print], ids=["nohup", "a handler"])
def test_who_has_taken_hangups_before_us_keeps_them(theirs: Any, hangup: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a server under nohup that reloads at a SIGHUP it was told to ignore; a host whose handler is lost."""
    monkeypatch.setenv(_IGNORED_BY, "")
    signal.signal(signal.SIGHUP, theirs)
    ignore_hangups()
    assert signal.getsignal(signal.SIGHUP) is theirs and not hangup_is_free()


def test_an_engine_may_be_made_in_any_thread(hangup: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a server set up by another thread than the main one, which alone may touch signals, that does not
    start."""
    monkeypatch.setenv(_IGNORED_BY, "")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ignore_hangups).result()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("ignored_by", "ours"),
    [(os.getpid(), True), (os.getppid(), True), (1 << 30, False), ("", False)],
    ids=["itself", "parent", "stranger", "nobody"],  # processes that collect the same tests have other numbers
)
def test_what_we_ignore_ourselves_gets_our_handler(
    ignored_by: int | str, ours: bool, hangup: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a server that ignores SIGHUP altogether, one of several API servers too; one under nohup, started from
    within another server's process, that does not."""
    monkeypatch.setenv(_IGNORED_BY, str(ignored_by))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    async def serve() -> bool:
        return on_hangup(None, Tasks())  # type: ignore[arg-type]

    assert asyncio.run(serve()) is ours


def test_no_handler_outside_of_the_main_thread(hangup: None) -> None:
    """Guards: an API server that runs in a thread does not start."""

    async def serve() -> bool:
        return await asyncio.to_thread(lambda: asyncio.run(inner()))

    async def inner() -> bool:
        return on_hangup(None, Tasks())  # type: ignore[arg-type]

    assert not asyncio.run(serve())


# ---- the engine


def test_vllm_sends_the_answer_when_it_is_there() -> None:
    """Guards: an engine that reads the file between two steps; a future that vLLM sends as a value, or never; a policy
    that is sent, and lost on the way."""
    asked: Future[dict[str, Any]] = Future()
    morph = object.__new__(Morph)
    heard: list[tuple[str, str]] = []
    morph._watch = SimpleNamespace(  # type: ignore[assignment]
        ask=lambda cause, sent, is_rehearsal: heard.append((cause, sent)) or asked  # type: ignore[func-returns-value]
    )
    morph.runtime = SimpleNamespace(index=1)  # type: ignore[assignment]
    core = SimpleNamespace(scheduler=SimpleNamespace(morph=morph))
    sent: list[Any] = []
    name, output = "morphserve_reload", UtilityOutput(5)
    EngineCoreProc._invoke_utility_method(name, lambda: engine._reload(core, "POST", "policy"), output, sent.append)
    assert sent == [] and heard == [("POST", "policy")]
    asked.set_result({"ok": True})
    assert sent == [output] and output.failure_message is None
    assert output.result.result == {"ok": True, "engine": 1}
    assert engine._reload(SimpleNamespace(scheduler=object()), "SIGHUP") is None


@pytest.mark.parametrize(
    ("additional", "file"),
    [
        ({"morphserve": {"config_file": "/a/b.yaml"}}, Path("/a/b.yaml")),
        ({"morphserve": {"policy": {"kind": "static"}}}, None),
        ({"morphserve": {}}, None),
        ({"morphserve": None}, None),
        ({}, None),
        (None, None),
    ],
)
def test_which_file_is_watched(additional: Any, file: Path | None) -> None:
    """Guards: inline settings that look for a file, or a file that nobody looks for."""
    assert config_file(additional) == file
