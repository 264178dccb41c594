"""Several policies on several windows, measured, and does the simulator say the same?

All servers are started once and take turns: a window is replayed against each of them, then the next window, then the
next repeat. Writes sweep.md and, per run, what `morphserve replay` writes (OUT/WINDOW/RUN.REPEAT/). Runs that are there
already are not measured again: an interrupted sweep goes on, and more --repeats add to it. With --step-times every run
is simulated too, on machines 0.9, 1.0 and 1.1 times as slow as calibrated, and compared.

With --simulate nothing is measured: hundreds of runs in a minute, --repeats of them with another seed of the noise.

Last stdout line: one JSON document.

    morphserve sweep --model MODEL_DIR --config demo --policy slo=slo.yaml \\
        --window convD --window hybB \\
        --compare stock,morphserve,slo,static_w8 --step-times step_times.json --repeats 3 --out reports/sweep

    morphserve sweep --simulate --step-times step_times.json --window windows.yaml \\
        --config demo --compare stock,morphserve --repeats 3 --out reports/simulated
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from morphserve.tools.bench import simulated
from morphserve.tools.bench.cli import comparison_of, settle_dtype
from morphserve.tools.bench.comparison import Comparison
from morphserve.tools.bench.options import prompt_options, run_options, server_options
from morphserve.tools.bench.report.console import ConsoleProgress
from morphserve.tools.bench.report.tables import fold
from morphserve.tools.bench.simulated import SimulatedEngine
from morphserve.tools.bench.sweep.agreement import SPEEDS, BySpeed, Rows, compare
from morphserve.tools.bench.sweep.ranking import dominated, totals
from morphserve.tools.bench.sweep.report import markdown
from morphserve.tools.bench.sweep.runs import measure_all, simulate_all
from morphserve.tools.checks import check_directory
from morphserve.tools.command import command_parser, run_command
from morphserve.tools.workload import ReplayError, check_fits, read_windows


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of all options."""
    parser = command_parser(__doc__, prog)
    group = parser.add_argument_group("workloads")
    group.add_argument(
        "--window",
        action="append",
        required=True,
        metavar="WINDOW",
        help="FILE[:window=START,LEN][:thin=K]..., or a YAML list of such, as of `morphserve tune`; repeatable",
    )
    prompt_options(group)
    run_options(parser.add_argument_group("runs"))
    server_options(parser.add_argument_group("servers (the same for all runs; all are up at once)"))
    simulated.simulation_options(parser.add_argument_group("simulation; without --step-times there is none"))
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "morphserve sweep") -> int:
    """Run the command line; the last line on stdout is one JSON document."""
    args = build_parser(prog).parse_args(argv)
    return run_command(prog, lambda: _sweep(args), "servers stopped, finished runs are kept: run again to go on")


def _sweep(args: argparse.Namespace) -> dict[str, Any]:
    if args.simulate:
        simulated.check_options(args)
    else:
        _check_servers(args)
    check_directory(args.out, "--out")
    settle_dtype(args)
    comparisons = _comparisons(args)
    comparisons[0].check(is_simulated=args.simulate)
    title, repeats = f"{len(args.compare)} runs on {len(comparisons)} windows", "interleaved repeats"
    title += f" in {args.dtype}" if args.dtype else ""
    # First, before hours of measuring: a config or a calibration that cannot be simulated.
    engine = None if args.step_times is None else simulated.load_engine(args)
    rows = {} if engine is None or args.simulate else _at_all_speeds(comparisons, engine)
    if args.simulate:
        measured = simulate_all(comparisons, engine)
        title, repeats = f"Simulated at {args.sim_speed:g} times the step times: {title}", "seeds"
    else:
        with ConsoleProgress(enabled=not args.quiet) as progress:
            measured = measure_all(comparisons, progress)
    text = markdown(measured, rows, title, repeats)
    report = args.out / "sweep.md"
    report.write_text(text, encoding="utf-8")
    sys.stderr.write(text)
    return _document(report, measured, rows)


def _comparisons(args: argparse.Namespace) -> list[Comparison]:
    """Read the windows; one comparison each."""
    comparisons = []
    for window in read_windows(args.window):
        check_fits(window.workload, args.max_model_len)
        comparison = comparison_of(args, window.source, window.workload, with_text=not args.simulate)
        comparisons.append(replace(comparison, out=args.out / window.name, window=window.name))
    return comparisons


def _document(report: Path, measured: Rows, by_speed: BySpeed) -> dict[str, Any]:
    return {
        "report": str(report),
        "runs": [
            {"name": t.run, "violation_rate": t.violation_rate, "expected_kl_per_token": t.expected_kl_per_token}
            for t in totals(measured)
        ],
        "dominated": [{"window": window, "by": baseline, "run": run} for window, baseline, run in dominated(measured)],
        "agreement": [
            {"window": a.window, "run": a.run, "figure": a.figure, "measured": a.measured, "simulated": a.simulated}
            for a in compare(measured, by_speed)
        ],
    }


def _check_servers(args: argparse.Namespace) -> None:
    if args.out is None or args.model is None:
        raise ReplayError("--out DIR and --model DIR are needed.")
    simulated.check_beside_servers(args)


def _at_all_speeds(comparisons: list[Comparison], engine: SimulatedEngine) -> BySpeed:
    by_speed = {speed: simulate_all(comparisons, replace(engine, speed=speed)) for speed in SPEEDS}
    return {key: {speed: fold(rows[key]) for speed, rows in by_speed.items()} for key in by_speed[1.0]}
