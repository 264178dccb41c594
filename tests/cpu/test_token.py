"""A token is read from a file that is its owner's alone, or refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from morphserve import user_input
from morphserve.errors import ConfigError
from morphserve.user_input import read_token, read_tokens

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize("text", [TOKEN, f"{TOKEN}\n", f"  {TOKEN}\r\n", "~" * 512])
def test_a_token_is_read(text: str, tmp_path: Path) -> None:
    """Guards: the end of a line that editors add, as a part of the token, so that nobody ever shows it."""
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(0o600)
    assert read_token(file) == text.strip()


NO_TOKENS = ("", "\n", "0123456789abcde", f"{TOKEN}\n{TOKEN}", "two words of a token", "größer" * 4, "~" * 513)


@pytest.mark.parametrize("text", NO_TOKENS)
def test_what_is_no_token_is_refused(text: str, tmp_path: Path) -> None:
    """Guards: an empty token, which everybody shows; one that can be guessed; one that no header can carry."""
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="must hold one line, 16 to 512") as refused:
        read_token(file)
    assert TOKEN not in str(refused.value), "what it holds is nobody's"


US, ROOT, ANOTHER = 1000, 0, 1001


@pytest.mark.parametrize(
    ("owner", "mode", "is_taken"),
    [
        (US, 0o600, True), (US, 0o400, True), (US, 0o640, False), (US, 0o604, False), (US, 0o620, False),
        (ROOT, 0o640, True), (ROOT, 0o440, True), (ROOT, 0o644, False), (ROOT, 0o660, False), (ROOT, 0o610, False),
        (ANOTHER, 0o600, False), (ANOTHER, 0o400, False),
    ],
)  # fmt: skip
def test_a_token_that_others_know_is_refused(
    owner: int, mode: int, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a token for every user of the machine; one that another user has put there."""
    seen = SimpleNamespace(st_mode=stat.S_IFREG | mode, st_uid=owner)
    system = SimpleNamespace(geteuid=lambda: US, fstat=lambda number: seen, fsencode=os.fsencode)
    monkeypatch.setattr(user_input, "os", system)
    monkeypatch.setattr(user_input, "open", lambda name, *args, **more: _Opened(TOKEN.encode()), raising=False)
    if is_taken:
        assert read_token(Path("token")) == TOKEN
        return
    with pytest.raises(ConfigError, match=f"mode {mode:04o}, owner {owner}: .* chmod 600"):
        read_token(Path("token"))


class _Opened:
    """A file that was opened."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *exception: Any) -> None:
        return None

    def fileno(self) -> int:
        return 0

    def read(self, count: int) -> bytes:
        return self._content[:count]


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    """Guards: a server that waits for ever for somebody to write into a pipe; a traceback for a directory."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, why in (("pipe", "chmod 600"), (".", "Is a directory"), ("gone", "No such file")):
        with pytest.raises(ConfigError, match=why):
            read_token(tmp_path / name)


def test_who_may_look_may_not_change_something_by_the_same_token(tmp_path: Path) -> None:
    """Guards: a copy of one token in both files, with which the credential of a dashboard drains the server."""
    admin, read = tmp_path / "admin", tmp_path / "read"
    for file, text in ((admin, TOKEN), (read, f"{TOKEN}\n")):
        file.write_text(text)
        file.chmod(0o600)
    assert read_tokens(None, None) == (None, None) and read_tokens(None, read) == (None, TOKEN)
    with pytest.raises(ConfigError, match="hold the same token. Give .*read another") as refused:
        read_tokens(admin, read)
    assert TOKEN not in str(refused.value)
    read.write_text(TOKEN[::-1])
    assert read_tokens(admin, read) == (TOKEN, TOKEN[::-1])
