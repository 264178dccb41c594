"""A file is replaced as a whole, or stays what it was."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from morphserve.cache import cache_root
from morphserve.config import MorphServeConfig, load_config, parse_config
from morphserve.files import replacing, write_whole
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


@pytest.mark.parametrize("fails", [True, False])
def test_two_who_write_one_file_do_not_meet(tmp_path: Path, fails: bool) -> None:
    """Guards: of two engines that keep a figure in one file, each goes on in what the other has begun: half of both, or
    no file where the first to end has moved or removed it."""
    file = tmp_path / "figures.json"
    with replacing(file) as theirs:
        theirs.write_text("the")
        with suppress(ValueError), replacing(file) as ours:
            assert ours.parent == theirs.parent == tmp_path
            ours.write_text("ours")
            if fails:
                raise ValueError
        assert fails or file.read_text() == "ours"
        theirs.write_text(theirs.read_text() + "irs")
    assert file.read_text() == "theirs" and list(tmp_path.iterdir()) == [file]


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
