"""What commands in this directory have in common: the docstring is the --help, the last line is one JSON document."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from morphserve.integration.offline import LevelEngine


def command_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose --help shows a command's docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def engine_parser(doc: str | None, cycles: int) -> argparse.ArgumentParser:
    """Return the parser of a command that does something to an engine of its own again and again, under load."""
    parser = command_parser(doc)
    parser.add_argument("model")
    parser.add_argument("--cycles", type=int, default=cycles)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--enforce-eager", action="store_true")
    return parser


def start_engine(model: str, settings: Mapping[str, Any] | None, **arguments: Any) -> LevelEngine:
    """Start an engine of the shape that figures in the docs are of; settings and arguments are `LevelEngine`'s."""
    from morphserve.integration.offline import LevelEngine

    return LevelEngine(model, settings, block_size=32, max_model_len=512, disable_log_stats=True, **arguments)


def say(line: str) -> None:
    """Write a line to stdout at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def finish(document: Any) -> int:
    """Write a command's last line, and return its exit status."""
    say(json.dumps(document))
    return 0


def fail(name: str, error: object) -> int:
    """Say on stderr what the user can repair, and return a command's exit status."""
    sys.stderr.write(f"{name}: {error}\n")
    return 1


def ms(seconds: Iterable[float], digits: int = 2) -> float:
    """Return the median in milliseconds."""
    return round(1e3 * statistics.median(seconds), digits)
