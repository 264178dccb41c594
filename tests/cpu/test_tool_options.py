"""Options that are declared as fields: what a command line becomes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest

from morphserve.tools.command import command_parser
from morphserve.tools.options import add_options, given, number, option, pair, read_options

pytestmark = pytest.mark.cpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One field of each kind."""

    place: str = option("where", flag="--at")
    size: int = option(default=3)
    limit_s: float = option(default=2.0, flag="--limit", unset=True)
    is_cold: bool = option(default=False)
    words: tuple[str, ...] = option(default=(), flag="--word", action="append")
    secret: int = 7


def parse(*words: str, **how: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, Model, **how)
    return parser.parse_args(words)


def test_a_command_line_becomes_a_model() -> None:
    """Guards: an option that is read and ignored, and a default that differs from the model's."""
    assert read_options(Model, parse("--at", "x")) == Model(place="x")
    words = ("--at", "x", "--size", "5", "--limit", "0", "--is-cold", "--word", "a", "--word", "b")
    assert read_options(Model, parse(*words), secret=1) == Model(
        place="x", size=5, limit_s=0.0, is_cold=True, words=("a", "b"), secret=1
    )
    assert parse("--at", "x").limit is None, "where nothing is given, others may put in what they found"
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parse()


def test_what_is_given_is_told_from_what_is_not() -> None:
    """Guards: an option of a simulation that a real server would ignore without a word."""
    assert list(given(parse("--at", "x"), Model, only=["size", "limit_s", "is_cold", "words"])) == []
    words = ("--at", "x", "--is-cold", "--limit", "2", "--word", "a", "--size", "4")
    assert list(given(parse(*words), Model)) == ["--at", "--size", "--limit", "--is-cold", "--word"]
    assert list(given(parse(*words), Model, only=["limit_s"])) == ["--limit"]


def test_some_of_the_options() -> None:
    """Guards: an option in a command that has no use for it."""
    assert vars(parse("--size", "1", only=["size"])) == {"size": 1}
    assert list(vars(parse(skip=["place", "words"]))) == ["size", "limit", "is_cold"]


def test_numbers_and_pairs() -> None:
    """Guards: the user not told what was wanted."""
    assert (number("1/16"), number("3"), pair(int, "LO,HI")("2,3")) == (0.0625, 3.0, (2, 3))
    for read, text in ((number, "1/0"), (number, "x"), (pair(int, "LO,HI"), "1"), (pair(int, "LO,HI"), "1,x")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not "):
            read(text)


def test_no_command_takes_the_beginning_of_an_option() -> None:
    """Guards: a script that breaks, or means another option, when one is added that begins alike."""
    parser = command_parser("what it does", "morphserve it")
    parser.add_argument("--rounds", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--round", "3"])
