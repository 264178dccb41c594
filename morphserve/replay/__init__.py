"""Replay traces against servers, measure them as `vllm bench serve` does, and report the comparison."""

from __future__ import annotations

from morphserve.replay.cli import main
from morphserve.replay.command import run_command
from morphserve.replay.errors import ReplayError, WorkloadError
from morphserve.replay.metrics import Slo
from morphserve.replay.paired import ClosedLoop, PairedResult, compare_idle
from morphserve.replay.prompts import load_encoder, read_corpus
from morphserve.replay.server import ServerOptions
from morphserve.replay.workload import Workload, WorkloadSpec, load_workload, save_workload

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
