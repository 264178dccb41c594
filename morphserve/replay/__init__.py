"""Replay traces against servers, measure them as `vllm bench serve` does, and report the comparison."""

from __future__ import annotations

from morphserve.replay.cli import main
from morphserve.replay.errors import ReplayError, WorkloadError
from morphserve.replay.metrics import Slo
from morphserve.replay.workload import Workload, WorkloadSpec, load_workload, save_workload

__all__ = [
    "ReplayError",
    "Slo",
    "Workload",
    "WorkloadError",
    "WorkloadSpec",
    "load_workload",
    "main",
    "save_workload",
]
