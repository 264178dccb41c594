"""Runs parts one after the other, each in a process and a time of its own, and keeps what they found."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from morphserve.tools.children import with_us
from morphserve.tools.gpucheck.machine import read_sensors
from morphserve.tools.gpucheck.parts import Part
from morphserve.tools.gpucheck.results import Findings, PartResult, Status, read_findings

_CLOSING_S = 3.0  # kept of the whole time for the last report
_SOFT = 0.85  # of its limit a part is told as its budget: loading torch, and its end, come out of the rest
_TAIL_CHARS = 3000
_ROOT = str(Path(__file__).resolve().parents[3])


@dataclass(frozen=True, slots=True)
class Options:
    """What holds for all parts."""

    device: str = "cuda"
    dry: bool = False
    minutes: float = 9.0
    clock: Callable[[], float] = time.monotonic
    environment: dict[str, str] = field(default_factory=dict)  # added to each part's
    log: Path | None = None  # what all parts print is appended to it as they do, so that it outlives us


def run_parts(
    parts: Sequence[Part],
    options: Options,
    report: Callable[[Sequence[PartResult]], None],
    missing: str | None = None,
) -> list[PartResult]:
    """Results in the order of `parts`.

    Args:
        parts: run in this order.
        options: see there.
        report: called with all results so far, after each part.
        missing: why none of them can run here; then all are skipped.
    """
    results: list[PartResult] = []
    start = options.clock()
    for part in parts:
        left_s = options.minutes * 60 - (options.clock() - start) - _CLOSING_S
        if missing is not None:
            result = PartResult(part.key, part.title, "skipped", missing)
        elif left_s < part.least_s:
            reason = f"{max(left_s, 0):.0f} s of {options.minutes:g} minutes are left, it needs {part.least_s:g}"
            result = PartResult(part.key, part.title, "no time", f"{reason}. Run it alone: --only {part.key}")
        else:
            result = run_one(part, options, min(part.budget_s, left_s))
        results.append(result)
        report(results)
    return results


def run_one(part: Part, options: Options, limit_s: float) -> PartResult:
    """Run one part in a process of its own, which is killed with all it started at its limit."""
    before = read_sensors()
    start = options.clock()
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as directory:
        file, log = Path(directory) / "findings.json", options.log or Path(directory) / "output"
        begin = log.stat().st_size if log.exists() else 0
        code = _supervise(_command(part, options, file, limit_s * _SOFT), options, log, limit_s)
        findings = read_findings(file)
        output = log.read_bytes()[begin:].decode("utf-8", errors="replace")
    seconds = options.clock() - start
    status, reason = judge(findings, code, limit_s)
    return PartResult(
        part.key, part.title, status, reason,
        seconds=round(seconds, 1),
        limit_s=round(limit_s, 1),
        sensors={"before": before, "after": read_sensors()},
        findings=findings or Findings(),
        output_tail=output[-_TAIL_CHARS:] if status == "failed" else "",
    )  # fmt: skip


def judge(findings: Findings | None, code: int | None, limit_s: float) -> tuple[Status, str]:
    """Status and reason.

    Args:
        findings: as far as the part got; None when it wrote none.
        code: how its process ended; None when it was killed at its limit.
        limit_s: that limit.
    """
    so_far = "" if findings is None or findings.finished else f", figures found until then: {len(findings.figures)}"
    if code is None:
        return "failed", f"killed: not done after {limit_s:.0f} s{so_far}"
    if findings is None or not findings.finished:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return "failed", f"its process died: {how}{so_far}"
    if findings.error:
        return "failed", findings.error
    if missed := [v for v in findings.verdicts if v.required and not v.ok]:
        return "failed", "; ".join(f"{v.name}: {v.detail or 'does not hold'}" for v in missed)
    if findings.skipped:
        return "skipped", findings.skipped
    if findings.out_of_time:
        return "no time", findings.out_of_time
    if not any(v.required for v in findings.verdicts):
        return "failed", "it checked nothing: no pass criterion was reached"
    return "ok", ""


def _command(part: Part, options: Options, file: Path, budget_s: float) -> list[str]:
    command = [sys.executable, "-m", "morphserve.tools.gpucheck.child", part.module, "--file", str(file)]
    command += ["--device", options.device, "--budget", f"{budget_s:.1f}"]
    command += ["--cut"] if budget_s < part.budget_s * _SOFT else []
    return [*command, "--dry"] if options.dry else command


def _environment(options: Options) -> dict[str, str]:
    """Ours, and this very package first on the path: scripts are run from anywhere. No print waits in a buffer."""
    found = {**os.environ, **options.environment}
    path = [_ROOT, *filter(None, found.get("PYTHONPATH", "").split(os.pathsep))]
    return found | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def _supervise(command: Sequence[str], options: Options, log: Path, limit_s: float) -> int | None:
    """Exit code, negative for a signal; None when the process was still there at the limit."""
    with log.open("ab") as output:
        process: subprocess.Popen[Any] = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, env=_environment(options), preexec_fn=with_us(),
        )  # fmt: skip
        try:
            return process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Also after a good end: engines that a part started must not outlive it and disturb the next.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
