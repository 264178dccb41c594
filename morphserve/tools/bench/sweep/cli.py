"""Command line of `scripts/sweep.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from morphserve.tools.bench import simulated
from morphserve.tools.bench.cli import comparison_of, settle_dtype
from morphserve.tools.bench.command import run_command
from morphserve.tools.bench.compare import Comparison
from morphserve.tools.bench.options import prompt_options, run_options, server_options
from morphserve.tools.bench.report.console import ConsoleProgress
from morphserve.tools.bench.sweep.agreement import SPEEDS, Row, compare, middle
from morphserve.tools.bench.sweep.measured import measure_all
from morphserve.tools.bench.sweep.ranking import dominated, totals
from morphserve.tools.bench.sweep.report import markdown
from morphserve.tools.workload import ReplayError, check_fits, read_windows


def build_parser(description: str, corpus: Path) -> argparse.ArgumentParser:
    """All options; `corpus` is the default text for prompts."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("workloads")
    group.add_argument(
        "--window",
        action="append",
        required=True,
        metavar="WINDOW",
        help="FILE[:window=START,LEN][:thin=K]..., or a YAML list of such, as of scripts/tune.py; repeatable",
    )
    prompt_options(group, corpus)
    run_options(parser.add_argument_group("runs"))
    server_options(parser.add_argument_group("servers (the same for all runs; all are up at once)"))
    simulated.add_options(parser.add_argument_group("simulation; without --step-times there is none"))
    return parser


def main(description: str, corpus: Path, argv: Sequence[str] | None = None) -> int:
    """Run the command line; the last line on stdout is one JSON document."""
    args = build_parser(description, corpus).parse_args(argv)
    return run_command("sweep", lambda: _sweep(args), "servers stopped, finished runs are kept: run again to go on")


def _sweep(args: argparse.Namespace) -> dict[str, Any]:
    if args.simulate:
        simulated.check_options(args)
    else:
        _check_servers(args)
    settle_dtype(args)
    if not args.simulate:
        args.serve_arg = [*args.serve_arg, *simulated.server_arguments(args)]
    comparisons: dict[str, Comparison] = {}
    for window in read_windows(args.window):
        check_fits(window.workload, args.max_model_len)
        comparison = comparison_of(args, window.source, window.workload, with_text=not args.simulate)
        comparisons[window.name] = replace(comparison, out=args.out / window.name)
    next(iter(comparisons.values())).check(is_simulated=args.simulate)
    title, repeats = f"{len(args.compare)} runs on {len(comparisons)} windows", "interleaved repeats"
    title += f" in {args.dtype}" if args.dtype else ""
    measured: dict[tuple[str, str], list[Row]]
    if args.simulate:
        measured, rows = _simulate(args, comparisons, args.sim_speed), {}
        title, repeats = f"Simulated at {args.sim_speed:g} times the step times: {title}", "seeds"
    else:
        # Before hours of measuring: a config or a calibration that cannot be simulated.
        rows = _at_all_speeds(args, comparisons) if args.step_times is not None else {}
        with ConsoleProgress(enabled=not args.quiet) as progress:
            measured = measure_all(comparisons, progress)
    text = markdown(measured, rows, title, repeats)
    report = args.out / "sweep.md"
    report.write_text(text, encoding="utf-8")
    sys.stderr.write(text)
    return {
        "report": str(report),
        "runs": [
            {"name": t.run, "violation_rate": t.violation_rate, "expected_kl_per_token": t.expected_kl_per_token}
            for t in totals(measured)
        ],
        "dominated": [{"window": window, "by": anchor, "run": run} for window, anchor, run in dominated(measured)],
        "agreement": [
            {"window": a.window, "run": a.run, "figure": a.figure, "measured": a.measured, "simulated": a.simulated}
            for a in (compare(measured, rows) if rows else ())
        ],
    }


def _check_servers(args: argparse.Namespace) -> None:
    if args.out is None or args.model is None:
        raise ReplayError("--out DIR and --model DIR are needed.")
    simulated.check_model_options(args)
    if args.sim_speed != 1.0:
        raise ReplayError("--sim-speed is of a simulation without servers. Add --simulate, or leave it out.")


def _at_all_speeds(
    args: argparse.Namespace, comparisons: Mapping[str, Comparison]
) -> dict[tuple[str, str], dict[float, Row]]:
    by_speed = {speed: _simulate(args, comparisons, speed) for speed in SPEEDS}
    return {key: {speed: middle(rows[key]) for speed, rows in by_speed.items()} for key in by_speed[1.0]}


def _simulate(
    args: argparse.Namespace, comparisons: Mapping[str, Comparison], speed: float
) -> dict[tuple[str, str], list[Row]]:
    """One row a repeat, by window and run; repeats differ in the seed of the noise."""
    rows: dict[tuple[str, str], list[Row]] = {}
    for window, comparison in comparisons.items():
        model = simulated.load_model(comparison, args)
        for name in comparison.names:
            directory = comparison.out / f"{name}.simulated"
            rows[window, name] = [
                simulated.run_one(comparison, name, repeat, directory, model, speed, args.seed + repeat).figures()
                for repeat in range(comparison.repeats)
            ]
    return rows
