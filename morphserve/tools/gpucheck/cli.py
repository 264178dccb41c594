"""What of MorphServe's NVIDIA path holds on this machine? Eleven parts, each in a process and a time of its own.

t1 paged arena, t2 mapping beside decode, t3 copies beside decode, t4 pages recycled with checksums, t5 kernels
against cuBLAS, t6 a small engine with a graph set per level, t7 the opaque linear under torch.compile, t8 stock vLLM,
t9 vLLM with the plugin without graphs, t10 compiled and with graphs, t11 with the shape of an 8B. The report,
gpu_check.json and gpu_check.md, is written after each part, what parts print, gpu_check.log, as they do: one that
crashes, hangs or is killed takes nothing along. What no longer fits into --minutes is reported as "no time".

Output columns: figure, unit, median, quartiles, p99, least to most, repeats; for each part ok, failed, skipped or no
time, with the reason; for each criterion whether it holds. Exit code: 0 no part failed, 1 one has, 3 no NVIDIA device,
4 none failed but there was no time for some. Last stdout line: one JSON document.

    morphserve gpu-check --out reports/gpu_check
    morphserve gpu-check --only t1,t3
    morphserve gpu-check --device cpu --dry-run      # tries the code paths without a GPU, measures nothing
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from morphserve.errors import ConfigError
from morphserve.files import write_whole
from morphserve.tools.checks import check_directory, more_than_zero
from morphserve.tools.command import command_parser, fail
from morphserve.tools.gpucheck.frame import Options, run_parts
from morphserve.tools.gpucheck.machine import describe_host, missing_device
from morphserve.tools.gpucheck.parts import Part, choose
from morphserve.tools.gpucheck.results import PartResult
from morphserve.tools.gpucheck.tables import DRY_BANNER, render, summary

EXIT_OK, EXIT_FAILED, EXIT_NO_DEVICE, EXIT_NO_TIME = 0, 1, 3, 4  # argparse takes 2


def main(argv: Sequence[str] | None = None, prog: str = "morphserve gpu-check") -> int:
    """Return 0: no part failed. 1: one has. 3: no NVIDIA device. 4: none failed, but for some there was no time."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("--only", default="", help="parts with commas between, such as t1,t3; default all")
    parser.add_argument("--skip", default="", help="parts to leave out, such as t8,t9")
    parser.add_argument("--minutes", type=more_than_zero, default=25.0, help="for the whole run")
    parser.add_argument("--out", type=Path, help="directory of the report; default $OUT, else reports/gpu_check")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="with --device cpu: try the code paths, measure nothing")
    args = parser.parse_args(argv)
    if (args.device == "cpu") != args.dry_run:
        parser.error("--device cpu and --dry-run go together: nothing measured on a CPU is a figure of a GPU")
    try:
        parts = choose(args.only, args.skip)
    except ValueError as e:
        parser.error(str(e))
    out = args.out or Path(os.environ.get("OUT") or "reports/gpu_check")
    try:
        check_directory(out, "--out")
    except ConfigError as e:
        return fail(prog, e)
    missing = None if args.device == "cpu" else missing_device()
    signal.signal(signal.SIGTERM, _exit)  # so that a part's process does not outlive us
    return check(parts, Options(args.device, args.dry_run, args.minutes), out, missing)


def check(parts: Sequence[Part], options: Options, out: Path, missing: str | None = None) -> int:
    """Run `parts`, keep the report in `out` up to date, print it, and say by the exit code what came of it."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "gpu_check.json", out / "gpu_check.md"]
    log = out / "gpu_check.log"
    log.write_bytes(b"")
    options = replace(options, log=log)
    machine = describe_host()

    def report(results: Sequence[PartResult]) -> None:
        for result in results:
            machine.update(result.findings.environment)
        waiting = [part.key for part in parts[len(results) :]]
        _write(files, machine, results, waiting, options)
        newest = results[-1] if results else None
        if newest is not None:
            print(f"{newest.part} {newest.status} {newest.seconds:g} s {newest.reason}", file=sys.stderr, flush=True)

    report([])
    results = run_parts(parts, options, report, missing)
    code = exit_code(results, missing)
    sys.stdout.write(render(machine, results, options.dry) + "\n")
    sys.stdout.write(json.dumps(summary(results, options.dry, [str(file) for file in files], code)) + "\n")
    return code


def exit_code(results: Sequence[PartResult], missing: str | None) -> int:
    """See `main`."""
    statuses = {result.status for result in results}
    if missing is not None:
        return EXIT_NO_DEVICE
    if "failed" in statuses:
        return EXIT_FAILED
    return EXIT_NO_TIME if "no time" in statuses else EXIT_OK


def _write(
    files: Sequence[Path],
    machine: dict[str, Any],
    results: Sequence[PartResult],
    waiting: Sequence[str],
    options: Options,
) -> None:
    note = f"Not run yet, or never reached: {', '.join(waiting)}." if waiting else ""
    document = {
        "dry_run": options.dry,
        "warning": DRY_BANNER if options.dry else "",
        "device": options.device,
        "minutes": options.minutes,
        "machine": machine,
        "not_run": list(waiting),
        "parts": [asdict(result) for result in results],
    }
    write_whole(files[0], json.dumps(document, indent=1))
    write_whole(files[1], render(machine, results, options.dry, note))


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
