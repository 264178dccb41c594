"""`morphserve pin`, `restore`, `pause`, `drain` and `resume`: what they send, what they say, how they end."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cpu.watched import QuietHandler, serving

from morphserve.control import parse_order

pytestmark = pytest.mark.cpu

TOKEN = "an-admin-of-tests"
ENGINE = {"engine": 0, "exposure_level": 0, "deepest_level": 8, "num_running": 3, "num_waiting": 0, "drained": False}
PINNED = {**ENGINE, "order": {"kind": "pin", "level": 2, "left_s": 600.0}}
COMMANDS = ("pin", "restore", "pause", "drain", "resume")


def main_of(name: str) -> Any:
    return importlib.import_module(f"morphserve.tools.admin.{name}").main


@pytest.fixture(autouse=True)
def token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    monkeypatch.setenv("MORPHSERVE_TOKEN_FILE", str(file))
    return file


@contextmanager
def taking(heard: list[Any], code: int = 200, answer: Any = None) -> Iterator[str]:
    """The address of a server at revision 7, and what it has heard: path and body of orders."""

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            assert self.path == "/morphserve/admin/state"
            self._say(200, {"revision": 7, "engines": [{**ENGINE, "order": None}]})

        def do_POST(self) -> None:
            assert self.headers["Authorization"] == f"Bearer {TOKEN}"
            assert self.headers["Content-Type"] == "application/json"
            heard.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self._say(code, answer or {"ok": True, "error": None, "revision": 8, "engines": [PINNED]})

        def _say(self, code: int, document: Any) -> None:
            self.say(code, json.dumps(document).encode())

    with serving(Handler) as url:
        yield url


@pytest.mark.parametrize(
    ("words", "action", "body"),
    [
        (["pin", "2", "--for", "600"], "pin", {"level": 2, "for_s": 600.0}),
        (["pin", "8bit", "--for", "1", "--cause", "why"], "pin", {"level": "8bit", "for_s": 1.0, "cause": "why"}),
        (["pin", "0", "--max", "--for", "60"], "max", {"level": 0, "for_s": 60.0}),
        (["restore"], "restore", {}),
        (["restore", "--for", "5"], "restore", {"for_s": 5.0}),
        (["pause"], "pause", {}),
        (["pause", "--for", "900"], "pause", {"for_s": 900.0}),
        (["drain", "--cause", "kernel"], "drain", {"cause": "kernel"}),
        (["resume"], "resume", {}),
    ],
)
def test_a_command_orders_what_it_says(
    words: list[str], action: Any, body: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a body that the server refuses, or that orders something else; a revision that nobody has looked at."""
    heard: list[Any] = []
    with taking(heard) as url:
        assert main_of(words[0])([*words[1:], "--url", url]) == 0
    ((path, sent),) = heard
    assert path == f"/morphserve/admin/{action}"
    assert json.loads(sent) == {"revision": 7, "cause": "", **body}
    parse_order(action, sent)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "engine 0: level 0 of 8, 3 running, 0 waiting; in force: pin level 2 for 600 s"
    assert json.loads(last)["revision"] == 8


@pytest.mark.parametrize(
    ("code", "answer", "said"),
    [
        (409, {"ok": False, "error": "revision 7 has passed", "revision": 9, "engines": []}, "revision 7 has passed"),
        (422, {"detail": "pin: level 9 is not on the ladder"}, "level 9 is not on the ladder"),
        (401, {"detail": "a token is asked for"}, "a token is asked for"),
        (404, {"detail": "Not Found"}, "Not Found"),
    ],
)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_refusal_is_one_sentence(
    name: str, code: int, answer: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: a script that goes on as if its order were in force; a traceback for what the server says."""
    arguments = ["1", "--for", "1"] if name == "pin" else []
    with taking([], code, answer) as url:
        assert main_of(name)([*arguments, "--url", url]) == 1
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert main_of(name)([*arguments, "--url", url]) == 1
    assert "no server answers" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [{"hello": "world"}, {"revision": 8}, [1, 2]])
def test_another_server_on_that_port_is_told_in_one_sentence(answer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a traceback where something answers that is no MorphServe, or only looks like it."""
    with taking([], 200, answer) as url:
        assert main_of("resume")(["--url", url]) == 1
    printed = capsys.readouterr()
    assert "answers, but not as MorphServe" in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_a_pin_without_an_end_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a pin of a minute that is there for months."""
    with pytest.raises(SystemExit) as ended:
        main_of("pin")(["2"])
    assert ended.value.code == 2 and "--for" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0", "soon"])
@pytest.mark.parametrize("command", [["pin", "2"], ["restore"], ["pause"]])
def test_what_is_no_time_is_wrong_usage(command: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a typo that travels to the server, and may be no JSON there."""
    name, *words = command
    heard: list[Any] = []
    with taking(heard) as url, pytest.raises(SystemExit) as ended:
        main_of(name)([*words, f"--for={text}", "--url", url])
    assert ended.value.code == 2 and not heard
    assert f"argument --for: {text!r}: give a number of seconds above 0, a day" in capsys.readouterr().err


def test_a_token_that_others_can_read_is_not_sent(token_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a token that was copied with the wrong mode, and works."""
    token_file.chmod(0o644)
    heard: list[Any] = []
    with taking(heard) as url:
        assert main_of("drain")(["--url", url]) == 1
    assert "chmod 600" in capsys.readouterr().err and heard == []
