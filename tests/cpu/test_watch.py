"""`morphserve status` and `morphserve watch`: what they print, and how they end."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cpu.test_golden_reports import same
from cpu.watched import answering, nobody, recorded, replicas
from rich.console import Console

from morphserve.status_view import panels
from morphserve.tools.watch import status_main, watch_main
from morphserve.tools.watch import watch as command
from morphserve.tools.watch.client import NoStatus, fetch_status
from morphserve.tools.watch.screen import ScreenView, draw
from morphserve.tools.watch.watch import LineView, watch

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o600)
    return file


class EndsAfter:
    """A view that keeps what it is shown, and then presses Ctrl-C."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.shown: list[tuple[str, str]] = []
        self.is_open = False

    def __enter__(self) -> EndsAfter:
        self.is_open = True
        return self

    def __exit__(self, *exception: Any) -> None:
        self.is_open = False

    def show(self, shown: Any, error: str, since_s: float) -> None:
        self.shown.append((shown[0].lines[0].text, error))
        if len(self.shown) == self.count:
            raise KeyboardInterrupt


def answers(*given: dict[str, Any] | None) -> Any:
    """A fetch that gives these one by one; None = nobody answers."""
    left = iter(given)

    def fetch(url: str) -> dict[str, Any]:
        document = next(left)
        if document is None:
            raise NoStatus(f"no server answers at {url}")
        return document

    return fetch


# ---- status


def test_status_prints_the_document_or_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a script gets another document than the server told, or people get one."""
    with answering(json.dumps(recorded("burst")).encode()) as url:
        assert status_main(["--url", url, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == recorded("burst")
        assert status_main(["--url", url.removeprefix("http://")]) == 0
    same("status_burst.txt", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (b'{"detail":"Not Found"}', 404, "serves without MorphServe (HTTP 404)"),
        (b'{"detail":"the engine runs without MorphServe"}', 503, "serves without MorphServe (HTTP 503)"),
        (b"", 401, "wants a token, or another one (HTTP 401). Name its file by --token-file"),
        (b"", 403, "does not show its status to everybody (HTTP 403)"),
        (b"oops", 500, "answers with HTTP 500"),
        (b"<html>", 200, "answers, but not with a status"),
        (b"[1, 2]", 200, "answers, but not with a status"),
        (b'{"engines": [1]}', 200, "answers, but not with a status"),
        (b'{"hello": "world"}', 200, "answers, but not with a status"),
        (b"\xff\xfe", 200, "answers, but not with a status"),
    ],
)
@pytest.mark.parametrize("main", [status_main, watch_main])
def test_no_status_is_one_sentence(
    main: Any, body: bytes, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a traceback, or a screen of nothing, for a stock server or for something else on that port."""
    with answering(body, code) as url:
        assert main(["--url", url]) == 1
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize("main", [status_main, watch_main])
def test_nobody_answers(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a server that is down, told as a traceback or with status 0."""
    url = nobody()
    assert main(["--url", url]) == 1
    said = capsys.readouterr().err
    assert f"no server answers at {url} (Connection refused). Start it" in said and said.count("\n") == 1


@pytest.mark.parametrize("url", ["http://", "ftp://host", "http://host:port", "http://host:0"])
def test_an_address_that_is_none_is_wrong_usage(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a typo in the address is looked up, and told as a server that is down."""
    with pytest.raises(SystemExit) as ended:
        status_main(["--url", url])
    assert ended.value.code == 2 and "is no address of a server" in capsys.readouterr().err


# ---- watch


def test_watching_goes_on_without_the_server_and_ends_as_it_is_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a restart of the server ends the view; its last figures vanish, or pass for fresh ones."""
    monkeypatch.setattr(command.time, "sleep", lambda seconds: None)
    view = EndsAfter(4)
    fetch = answers(recorded("burst"), None, None, recorded("restored"))
    assert watch("http://x", 1.0, view, fetch) == 0
    burst, restored = (panels(recorded(name))[0].lines[0].text for name in ("burst", "restored"))
    gone = "no server answers at http://x"
    assert view.shown == [(burst, ""), (burst, gone), (burst, gone), (restored, "")] and not view.is_open
    assert watch("http://x", 1.0, EndsAfter(2), answers(recorded("burst"), None)) == 1


def test_ctrl_c_where_python_drops_its_exception_ends_the_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a view that goes on when the key was pressed during a finalizer."""
    monkeypatch.setattr(command.time, "sleep", lambda seconds: None)

    class Finalized:
        def __del__(self) -> None:
            with suppress(KeyboardInterrupt):  # as Python does here, with a line on stderr
                os.kill(os.getpid(), signal.SIGINT)

    def fetch(url: str) -> dict[str, Any]:
        if len(view.shown) == 2:
            Finalized()
        return recorded("calm")

    view = EndsAfter(9)
    assert watch("http://x", 1.0, view, fetch) == 0
    assert len(view.shown) == 2 and not view.is_open


def test_ctrl_c_between_two_looks_gives_the_screen_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a terminal that stays in the view's screen."""

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", interrupt)
    view = EndsAfter(2)
    assert watch("http://x", 1.0, view, answers(recorded("calm"))) == 0
    assert len(view.shown) == 1 and not view.is_open


def test_lines_for_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a log in which a transition between two looks is lost, or what was before is told as news."""
    view = LineView(clock=lambda: "12:00:00")
    before = recorded("restored")
    first = {**before, "recent_transitions": before["recent_transitions"][1:]}
    for document, error in ((first, ""), (before, ""), (before, "gone"), (before, "gone"), (before, "")):
        view.show(panels(document), error, 3.0)
    lines = capsys.readouterr().out.splitlines()
    summary = f"12:00:00  {panels(before)[0].summary}"
    newest = panels(before)[0].changes[0]
    change = f"12:00:00  {newest.move} {newest.outcome} in {newest.took} ({newest.why})"
    assert lines == [summary, change, summary, "12:00:00  gone", summary]


def test_lines_name_the_engine_where_there_are_several(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: two replicas in one log, and nobody knows which."""
    LineView(clock=lambda: "12:00:00").show(panels(replicas()), "", 0.0)
    assert [line.split()[1:3] for line in capsys.readouterr().out.splitlines()] == [["engine", "0:"], ["engine", "1:"]]


def test_a_pipe_that_closes_ends_the_watch() -> None:
    """Guards: `morphserve watch | head` ends in a traceback."""
    code = "from morphserve.tools.watch import watch_main; raise SystemExit(watch_main())"
    with answering(json.dumps(recorded("calm")).encode()) as url:
        arguments = [sys.executable, "-c", code, "--url", url, "--interval", "0.1"]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None and process.stderr is not None
        assert b"level 0 of" in process.stdout.readline()
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, b"")
        process.stderr.close()


def test_an_interval_out_of_bounds_is_wrong_usage() -> None:
    """Guards: a view that asks a thousand times a second, or never again."""
    for interval in ("0", "-1", "nan", "1e9"):
        with pytest.raises(SystemExit) as ended:
            watch_main(["--interval", interval])
        assert ended.value.code == 2


# ---- the screen


def drawn(document: dict[str, Any], width: int, error: str = "") -> str:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=width, file=nowhere, force_terminal=True, legacy_windows=False)
        console.print(draw(panels(document), error, 12.0, width))
        return console.export_text()


@pytest.mark.parametrize(
    ("name", "width"), [("calm", 100), ("moving", 80), ("burst", 120), ("burst", 50), ("restored", 100)]
)
def test_the_screen(name: str, width: int) -> None:
    """Guards: figures that are cut off or run into each other, on a wide terminal or a narrow one."""
    shown = drawn(recorded(name), width)
    assert max(map(len, shown.splitlines())) <= width
    same(f"watch_{name}_{width}.txt", shown)


def test_the_screen_of_several_engines_and_of_one_that_is_gone() -> None:
    """Guards: replicas of which one is shown; old figures that look fresh."""
    shown = drawn(replicas(), 100, "no server answers at http://x (Connection refused).")
    assert shown.startswith("no server answers at http://x (Connection refused). What follows is 12 s old.")
    overview = [line for line in shown.splitlines() if line.startswith("engine")]
    assert [line.split()[1] for line in overview] == ["0", "1"] and shown.count("KV blocks") == 4


def test_what_a_terminal_obeys_is_not_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: an error or a reason with escape codes, or with rich's own marks, that the terminal carries out."""
    evil = "a\x1b[2J[bold]b[/bold]\nc\x07"
    document = {**recorded("burst"), "reason": evil, "errors": {evil: 1}}
    document["recent_transitions"] = [{**document["recent_transitions"][0], "reason": evil}]
    shown = drawn(document, 120)
    assert "\x1b" not in shown and "\x07" not in shown and "a [2J[bold]b[/bold] c " in shown
    LineView(clock=lambda: "").show(panels(document), "", 0.0)
    with answering(json.dumps(document).encode()) as url:
        assert status_main(["--url", url]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and "a [2J[bold]b[/bold] c " in printed


def test_the_screen_is_taken_and_given_back() -> None:
    """Guards: a terminal that is left without its cursor, or in another screen, after the view."""
    console = Console(record=True, width=100, height=30, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    with ScreenView(console) as view:
        view.show(panels(recorded("burst")), "", 0.0)
        assert console.is_alt_screen
    assert not console.is_alt_screen
    console.file.close()


def test_ctrl_c_on_a_terminal() -> None:
    """Guards: a live view that no key ends, or that leaves the terminal in its screen and without a cursor."""
    code = "from morphserve.tools.watch import watch_main; raise SystemExit(watch_main())"
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    with answering(json.dumps(recorded("burst")).encode()) as url, open(ours, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "--url", url], cwd=ROOT, env=environment,
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        seen = b""
        while b"Ctrl-C ends the view" not in seen:
            seen += screen.read(4096)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # what reading the last of a closed terminal gives
            while more := screen.read(4096):
                seen += more
        assert process.wait(60) == 0
    assert b"Traceback" not in seen and b"\x1b[?1049h" in seen
    assert seen.rindex(b"\x1b[?1049l") > seen.rindex(b"engine 0") and b"\x1b[?25h" in seen


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: cursor movements in an editor's shell or in a log."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(command.make_view(), LineView)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(command.make_view(), ScreenView)
    monkeypatch.setitem(sys.modules, "morphserve.tools.watch.screen", None)  # as without rich
    assert isinstance(command.make_view(), LineView)


def test_a_token_for_this_machine_goes_through_no_proxy(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a token that the proxy of the environment gets to see, or a server here that nobody reaches."""
    asked: list[Any] = []
    with answering(b"", 502, asked) as proxy, answering(json.dumps(recorded("calm")).encode()) as url:
        monkeypatch.setenv("http_proxy", proxy)
        assert fetch_status(url, token) == recorded("calm")
        assert fetch_status(url.replace("127.0.0.1", "localhost"), token) == recorded("calm")
    assert asked == []


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_token_is_shown_to_the_server_that_was_named_alone(code: int, token: Path) -> None:
    """Guards: a token that a redirect takes to another server."""
    asked: list[Any] = []
    with (
        answering(json.dumps(recorded("calm")).encode(), heard=asked) as other,
        answering(b"", code, location=f"{other}/morphserve/status") as url,
        pytest.raises(NoStatus, match=f"sends whoever asks elsewhere .HTTP {code}."),
    ):
        fetch_status(url, token)
    assert asked == []


def test_fetch_gives_what_was_told() -> None:
    """Guards: a document that changes on its way."""
    with answering(json.dumps(replicas()).encode()) as url:
        assert fetch_status(url) == replicas()


@pytest.mark.parametrize("how", ["option", "environment"])
@pytest.mark.parametrize("main", [status_main, watch_main])
def test_a_token_is_shown(
    main: Any, how: str, token: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a server with a token that no command can look at; a token on a command line, for `ps` to show."""
    file, asked = token, list[Any]()

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", interrupt)
    if how == "environment":
        monkeypatch.setenv("MORPHSERVE_TOKEN_FILE", str(file))
    options = ["--token-file", str(file)] if how == "option" else []
    with answering(json.dumps(recorded("calm")).encode(), heard=asked) as url:
        assert main(["--url", url, *options]) == 0
        assert asked[0]["Authorization"] == "Bearer 0123456789abcdef"
        file.chmod(0o644)
        assert main(["--url", url, *options]) == 1
    assert "chmod 600" in capsys.readouterr().err and len(asked) == 1
