"""Replay traces against servers, measure them as `vllm bench serve` does, and report the comparison."""

from __future__ import annotations

from morphserve.tools.bench.cli import main
from morphserve.tools.bench.load.client import ClientOptions, completion_body, send
from morphserve.tools.bench.load.scrape import Poller, status_of
from morphserve.tools.bench.load.server import Server, ServerOptions, serve
from morphserve.tools.bench.paired import ClosedLoop, PairedResult, compare_idle, half_width
from morphserve.tools.bench.prepared import with_prepared
from morphserve.tools.bench.report.tables import percent

__all__ = [
    "ClientOptions",
    "ClosedLoop",
    "PairedResult",
    "Poller",
    "Server",
    "ServerOptions",
    "compare_idle",
    "completion_body",
    "half_width",
    "main",
    "percent",
    "send",
    "serve",
    "status_of",
    "with_prepared",
]
