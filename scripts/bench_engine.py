"""What the benchmarks that run an engine in their own process have in common."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from morphserve.tools.command import command_parser

if TYPE_CHECKING:
    from morphserve.integration.offline import LevelEngine


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


def ms(seconds: Iterable[float], digits: int = 2) -> float:
    """Return the median in milliseconds."""
    return round(1e3 * statistics.median(seconds), digits)
