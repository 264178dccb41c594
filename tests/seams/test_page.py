"""The page at /morphserve: what it is served with, what it reads, and what it shows in a browser."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import threading
import tomllib
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

import pytest
import uvicorn
from cpu.watched import recorded, replicas
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from seams import asked
from seams.asked import ADMIN, READ, client_of, endpoint_of

from morphserve.integration.server.metrics import MorphServeEndpoint
from morphserve.integration.server.poll import StatusPoll
from morphserve.integration.server.routes.access import Access
from morphserve.integration.server.routes.page import PAGE
from morphserve.integration.server.routes.status_api import LastStatuses
from morphserve.status_view import Bar, Change, LevelRow, Line, Panel, panels

HTML = PAGE.read_text(encoding="utf-8")
Browse = Callable[..., str]

Answer = Callable[[], list[Any]]


class LookedAt(LastStatuses):
    """A poll at each look."""

    def __init__(self, poll: StatusPoll, answer: Answer) -> None:
        super().__init__(poll)
        self._answer = answer

    def of(self, engine: int | None) -> list[dict[str, Any]]:
        self._poll.last = [status for status in self._answer() if status is not None]
        return super().of(engine)


def endpoint_that(answer: Answer, access: Access | None = None) -> MorphServeEndpoint:
    """An API server whose engines answer so."""
    endpoint = endpoint_of(access=access)
    endpoint._last = LookedAt(endpoint._poll, answer)
    return endpoint


def app_of(answer: Answer, access: Access | None = None) -> FastAPI:
    return asked.app_of(endpoint_that(answer, access))


# ---- without a browser


def digest(tag: str) -> str:
    """What allows the one element of that name in the page."""
    text = HTML.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


@pytest.mark.parametrize("path", ["/morphserve", "/morphserve/"])
def test_the_page_is_served_with_its_type_and_nothing_else_may_run(path: str) -> None:
    """Guards: a download instead of a page, a redirect that a proxy breaks, or a script from elsewhere."""
    answer = client_of(endpoint_that(list), follow_redirects=False).get(path)
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")) == {
        "default-src": "'none'", "script-src": digest("script"), "style-src": digest("style"), "connect-src": "'self'",
        "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'self'",
    }  # fmt: skip
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.text == HTML


def test_the_page_asks_and_never_tells() -> None:
    """Guards: a view that changes something, or one that is there for those who may only POST."""
    client = client_of(endpoint_that(lambda: [recorded("calm")]))
    for path in ("/morphserve", "/morphserve/view"):
        assert client.post(path).status_code == 405 == client.delete(path).status_code
    assert not re.search(r"method\s*:|<form|XMLHttpRequest|sendBeacon", HTML)


def test_nothing_of_the_page_comes_from_elsewhere_or_becomes_markup() -> None:
    """Guards: a font or a script of somebody else's server, or a reason from a log that is run as markup."""
    assert not re.search(r"https?:|//[a-z]|@import|\bsrc=|<link", HTML.replace("// Whatever", ""))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\bon[a-z]+=", HTML)
    assert not re.search(r"setHTML|srcdoc|ContextualFragment|DOMParser|Function\(|javascript:", HTML)


def test_the_view_is_the_terminals() -> None:
    """Guards: a page that shows other figures than `morphserve watch`."""
    client = client_of(endpoint_that(lambda: list(replicas()["engines"])))
    shown = client.get("/morphserve/view").json()["panels"]
    assert [panel["title"] for panel in shown] == ["engine 0", "engine 1"]
    for told, panel in zip(shown, panels(replicas()), strict=True):
        assert told["summary"] == panel.summary and len(told["changes"]) == len(panel.changes)
        assert [line["text"] for line in told["lines"]] == [line.text for line in panel.lines]
    assert client_of(endpoint_that(lambda: [None])).get("/morphserve/view").status_code == 503


def test_every_field_that_the_page_reads_is_there() -> None:
    """Guards: a field that has another name since, and is shown as `undefined`."""
    script = HTML.partition("<script>")[2]
    parts = {"panel": Panel, "line": Line, "bar": Bar, "l": LevelRow, "c": Change}
    read = {name: set(re.findall(rf"\b{name}\.(\w+)", script)) for name in parts}
    for name, part in parts.items():
        assert read[name] and read[name] <= {field.name for field in fields(part)}, (name, read[name])
    unread = {name: {field.name for field in fields(part)} - read[name] for name, part in parts.items()}
    assert unread == {"panel": {"summary"}, "line": set(), "bar": set(), "l": set(), "c": {"revision"}}


def test_the_page_travels_in_the_wheel() -> None:
    """Guards: a server from a package without its page, which ends while it starts."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["morphserve"]
    assert any(PurePath(f"integration/server/routes/{PAGE.name}").match(pattern) for pattern in patterns)


# ---- in a browser


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of a server of this application."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not (server.started and server.servers):
            thread.join(0.01)
            assert thread.is_alive()
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def run_chromium(tmp_path_factory: pytest.TempPathFactory) -> Browse:
    """Chromium without a window, where there is one that starts: from an address to what it makes of the page."""
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no Chromium is installed (Debian: apt install chromium)")
    profile = tmp_path_factory.mktemp("profile")

    def run(url: str, virtual_ms: int) -> str:
        command = [found[0], "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={profile}", f"--virtual-time-budget={virtual_ms}", "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0 or "<body" not in done.stdout:
            pytest.fail(f"{found[0]} ended with {done.returncode}: {done.stderr[-1000:]}")
        return done.stdout

    try:
        run("about:blank", 100)
    except (pytest.fail.Exception, subprocess.TimeoutExpired) as e:
        pytest.skip(f"Chromium does not start here: {str(e)[-300:]}")
    return run


@pytest.fixture
def dom(run_chromium: Browse) -> Browse:
    """The page's body after so much time, in which the browser's clock stands while it waits for an answer."""

    def body(url: str, virtual_ms: int = 2500) -> str:
        return run_chromium(url, virtual_ms).partition("<body")[2].partition("<script>")[0]

    return body


def text_of(markup: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", markup))


@pytest.mark.parametrize("path", ["/morphserve", "/morphserve/"])
def test_a_browser_shows_all_engines(path: str, dom: Browse) -> None:
    """Guards: a page that its own headers, or a mistake in its script, keep empty."""
    with served(app_of(lambda: list(replicas()["engines"]))) as url:
        shown = dom(url + path)
    words = text_of(shown)
    assert "live, as of" in words and shown.count("<section") == 2 and "undefined" not in words
    for panel in panels(replicas()):
        for line in panel.lines:
            assert text_of(line.text.replace(">", "&gt;")) in words, line
    # An element for each level and each transition, two heads a panel.
    rows = sum(len(panel.levels) + len(panel.changes) for panel in panels(replicas()))
    heads = sum(bool(panel.levels) + bool(panel.changes) for panel in panels(replicas()))
    assert shown.count("<tr") == rows + heads and shown.count("<progress") == 2


def test_a_page_under_a_root_path(dom: Browse) -> None:
    """Guards: behind a proxy that adds a prefix the page asks its root."""
    outside = FastAPI()
    outside.mount("/models/a", app_of(lambda: [recorded("burst")]))
    with served(outside) as url:
        words = text_of(dom(f"{url}/models/a/morphserve"))
    assert "live, as of" in words and "KV blocks" in words


def test_what_the_server_says_is_text(dom: Browse) -> None:
    """Guards: a reason, an error or a file's name becomes an element, or a script that runs."""
    evil = "<img src=x onerror=document.title='caught'><script>1</script>"
    status = {**recorded("burst"), "reason": evil, "errors": {evil: 1}, "phase": evil}
    status["recent_transitions"] = [{**recorded("restored")["recent_transitions"][0], "reason": evil, "outcome": evil}]
    with served(app_of(lambda: [status])) as url:
        shown = dom(f"{url}/morphserve")
    assert "<img" not in shown and shown.count("&lt;img src=x") >= 3


def test_a_server_that_goes_away_is_said(dom: Browse) -> None:
    """Guards: old figures that look live after the engine has died."""
    asked: list[int] = []

    def answer() -> list[Any]:
        asked.append(1)
        return [recorded("burst")] if len(asked) == 1 else [None]

    with served(app_of(answer)) as url:
        words = text_of(dom(f"{url}/morphserve", 4500))
    assert len(asked) >= 2, "it asks again"
    assert "No answer from the server: the engine runs without MorphServe, or is gone. What follows is of" in words
    assert "KV blocks" in words


@pytest.mark.parametrize(("token", "is_let_in"), [(READ, True), (f"{READ}x", False)])
def test_a_page_that_is_asked_for_a_token_asks_for_one(token: str, is_let_in: bool, dom: Browse) -> None:
    """Guards: an operator whose server has a token sees no page any more; one who mistypes it is told nothing."""
    types = f"const field = document.getElementById('token'); field.value = '{token}';"
    types = f"setTimeout(() => {{ {types} field.dispatchEvent(new Event('change')); }}, 1500);"
    app = app_of(lambda: [recorded("burst")], Access(ADMIN, READ))
    page = HTML.replace("<script>", f"<script>{types}</script><script>", 1)
    app.add_api_route("/other/morphserve", lambda: HTMLResponse(page))  # without the headers that allow one script
    app.mount("/other", app_of(lambda: [recorded("burst")], Access(ADMIN, READ)))
    with served(app) as url:
        before, after = (dom(f"{url}/other/morphserve", virtual_ms) for virtual_ms in (1000, 4500))
    assert "HTTP 401, a token is asked for" in text_of(before) and 'hidden=""' not in before
    assert ("live, as of" in text_of(after), 'hidden=""' in after) == (is_let_in, is_let_in)
    assert "<section" not in before and after.count("<section") == is_let_in


# What stands before the page's own script, and how often it may ask in ten seconds.
SEEN = "let seen = true; Object.defineProperty(document, 'hidden', {get: () => !seen});"
TURN = "seen = !seen; document.dispatchEvent(new Event('visibilitychange'));"


@pytest.mark.parametrize(
    ("before", "fewest", "most"),
    [
        (SEEN, 6, 11),
        (f"{SEEN} seen = false;", 0, 0),
        (f"{SEEN} setTimeout(() => {{ {TURN} }}, 1500);", 1, 3),
        (f"{SEEN} seen = false; setTimeout(() => {{ {TURN} }}, 8500);", 1, 3),
    ],
    ids=["seen", "hidden", "hidden later", "seen again"],
)
def test_a_page_that_nobody_sees_asks_nothing(before: str, fewest: int, most: int, dom: Browse) -> None:
    """Guards: a forgotten tab that asks the engine once a second for days; one that stays old when it is seen again."""
    asked: list[int] = []

    def answer() -> list[Any]:
        asked.append(1)
        return [recorded("calm")]

    app = app_of(answer)
    page = HTML.replace("<script>", f"<script>{before}</script><script>", 1)
    app.add_api_route("/other/morphserve", lambda: HTMLResponse(page))  # without the headers that allow one script
    app.mount("/other", app_of(answer))
    with served(app) as url:
        dom(f"{url}/other/morphserve", 10_000)
    assert fewest <= len(asked) <= most
