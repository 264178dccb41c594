"""A file is replaced as a whole, or stays what it was; one that holds a token is its owner's alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from morphserve import files
from morphserve.cache import cache_root
from morphserve.config import MorphServeConfig, load_config, parse_config
from morphserve.errors import ConfigError
from morphserve.files import read_token, replacing, write_whole
from morphserve.shipped import DEFAULT_CONFIG
from morphserve.tools.quantize import cli as quantize


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """Guards: a reader, or whoever starts after a kill, that meets half a file; a partial left beside the whole one."""
    file = tmp_path / "figures.json"
    write_whole(file, "old")
    with replacing(file) as partial:
        partial.write_text("ne")
        assert file.read_text() == "old"
        partial.write_text("new")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]
    write_whole(file, "größer")
    assert file.read_bytes() == "größer".encode() and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("in torch"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    """Guards: the old file lost to a write that failed, and partials that fill a disk which is full already."""
    file = tmp_path / "figures.json"
    for before in ([], [file]):
        with pytest.raises(type(error)), replacing(file) as partial:
            partial.write_text("half")
            raise error
        assert list(tmp_path.iterdir()) == before
        write_whole(file, "old")
    assert file.read_text() == "old"


def test_what_another_process_has_begun_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: of two engines that keep a figure in one file, the first to end removes what the second is writing."""
    file, move = tmp_path / "figures.json", os.replace

    def move_then_begin(source: Path, target: Path) -> None:
        move(source, target)
        source.write_text("theirs")

    monkeypatch.setattr(os, "replace", move_then_begin)
    write_whole(file, "ours")
    assert file.with_name("figures.json.partial").read_text() == "theirs"


# ---- tokens

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
    system = SimpleNamespace(geteuid=lambda: US, fstat=lambda number: seen)
    monkeypatch.setattr(files, "os", system)
    monkeypatch.setattr(files, "open", lambda name, *args, **more: _Opened(TOKEN.encode()), raising=False)
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
@pytest.mark.parametrize("named", [True, False])
def test_all_that_is_kept_lies_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    """Guards: a directory that somebody has named, and a part that lands in the one that is full."""
    from quant_layers.kernels import native

    monkeypatch.delenv("MORPHSERVE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = tmp_path / "home" / ".cache" / "morphserve"
    if named:
        root = tmp_path / "large"
        monkeypatch.setenv("MORPHSERVE_CACHE", str(root))
    assert cache_root() == root and native.default_directory() == root / "native"
    for config in (MorphServeConfig(), parse_config({"cache_dir": None}), load_config(DEFAULT_CONFIG)):
        assert config.cache_dir == root
    assert parse_config({"cache_dir": "/mine"}).cache_dir == Path("/mine")
    assert quantize._parser("quantize").parse_args(["m", "--out", "o"]).environment == root / "quantize-env"
