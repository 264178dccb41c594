"""Replay traces against servers, measure them as `vllm bench serve` does, and report the comparison."""

from __future__ import annotations

from morphserve.tools.bench.cli import main
from morphserve.tools.bench.load.server import ServerOptions, serve
from morphserve.tools.bench.paired import ClosedLoop, PairedResult, compare_idle
from morphserve.tools.bench.prepared import with_prepared
from morphserve.tools.bench.report.tables import percent

__all__ = [
    "ClosedLoop",
    "PairedResult",
    "ServerOptions",
    "compare_idle",
    "main",
    "percent",
    "serve",
    "with_prepared",
]
