"""Replay traces against servers, measure them as `vllm bench serve` does, and report the comparison."""

from __future__ import annotations

from morphserve.tools.bench.cli import main
from morphserve.tools.bench.command import run_command
from morphserve.tools.bench.load.server import ServerOptions
from morphserve.tools.bench.paired import ClosedLoop, PairedResult, compare_idle
from morphserve.tools.workload import (
    ReplayError,
    Slo,
    Workload,
    WorkloadError,
    WorkloadSpec,
    load_encoder,
    load_workload,
    read_corpus,
    save_workload,
)

__all__ = [
    "ClosedLoop",
    "PairedResult",
    "ReplayError",
    "ServerOptions",
    "Slo",
    "Workload",
    "WorkloadError",
    "WorkloadSpec",
    "compare_idle",
    "load_encoder",
    "load_workload",
    "main",
    "read_corpus",
    "run_command",
    "save_workload",
]
