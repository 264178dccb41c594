"""What is sent and what came of it: traces, prompts, outcomes, and the figures of a run. No engine, no client."""

from __future__ import annotations

from morphserve.tools.workload.errors import ReplayError, WorkloadError
from morphserve.tools.workload.limits import check_times
from morphserve.tools.workload.metrics import Slo, bench_result, dispatch_lag, violations
from morphserve.tools.workload.outcome import CUTOFF, ERROR, OK, TIMEOUT, Outcome, Replayed, Snapshot
from morphserve.tools.workload.prompts import PromptMaker, load_encoder, read_corpus
from morphserve.tools.workload.served import ANSWERS_FILE, UNKNOWN, ServedAnswer, load_answers, save_answers
from morphserve.tools.workload.windows import Window, read_windows
from morphserve.tools.workload.workload import Workload, WorkloadSpec, check_fits, load_workload, save_workload

__all__ = [
    "ANSWERS_FILE",
    "CUTOFF",
    "ERROR",
    "OK",
    "Outcome",
    "PromptMaker",
    "ReplayError",
    "Replayed",
    "ServedAnswer",
    "Slo",
    "Snapshot",
    "TIMEOUT",
    "UNKNOWN",
    "Window",
    "Workload",
    "WorkloadError",
    "WorkloadSpec",
    "bench_result",
    "check_fits",
    "check_times",
    "dispatch_lag",
    "load_answers",
    "load_encoder",
    "load_workload",
    "read_corpus",
    "read_windows",
    "save_answers",
    "save_workload",
    "violations",
]
