"""Options of the command lines as they were when these files were last looked at: scripts of others give them.

An option that is to change: delete the file, run this (a missing file is written, and its test fails once), read the
difference.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
from cpu.test_golden_reports import same

from morphserve.shipped import SEARCH_SPACE, TEXT
from morphserve.tools.bench import options
from morphserve.tools.bench.sweep import cli as sweep
from morphserve.tools.tune import cli as tune

pytestmark = pytest.mark.cpu


def described(parser: argparse.ArgumentParser) -> str:
    """One line an option, sorted: which group it stands in and in which order may change."""
    text = "".join(f"{line}\n" for line in sorted(lines(parser)))
    for shipped in (TEXT, SEARCH_SPACE):  # wherever the package lies
        text = text.replace(repr(shipped), "PosixPath('FILE')")
    return text


def lines(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if action.option_strings == ["-h", "--help"]:
            continue
        kind = "flag" if action.nargs == 0 else type(action).__name__.strip("_").removesuffix("Action").lower()
        words = [
            *action.option_strings, kind, f"default={action.default!r}", f"metavar={action.metavar}",
            f"choices={action.choices}", f"required={action.required}", f": {action.help}",
        ]  # fmt: skip
        yield " ".join(words)
        if action.nargs != 0:
            yield f"{action.option_strings[0]} reads {', '.join(map(repr, read(action)))}"


def read(action: argparse.Action) -> Iterator[object]:
    """What becomes of some texts."""
    for text in ("7", "0.5", "1/4", "2,3", "a=b"):
        try:
            yield action.type(text) if callable(action.type) else text
        except (ValueError, argparse.ArgumentTypeError) as e:
            yield type(e).__name__


@pytest.mark.parametrize("name", ["replay", "sweep", "tune"])
def test_options(name: str) -> None:
    """Guards: an option lost, or with another default or meaning, where its declaration moves."""
    parsers = {
        "replay": options.build_parser("", "replay"), "sweep": sweep.build_parser("sweep"),
        "tune": tune.build_parser("tune"),
    }  # fmt: skip
    same(f"options_{name}.txt", described(parsers[name]))
