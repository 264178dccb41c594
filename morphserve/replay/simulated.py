"""A comparison without servers: every run on the simulated engine, the same figures and the same report."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from morphserve.config import parse_config
from morphserve.profile_ladder import read_ladder
from morphserve.replay.compare import (
    STOCK,
    Comparison,
    Progress,
    derived_config,
    run_directory,
    run_title,
    static_format,
)
from morphserve.replay.environment import describe_machine
from morphserve.replay.errors import ReplayError
from morphserve.replay.results import RunResult

if TYPE_CHECKING:  # it builds on this package
    from morphserve.simulation import Calibration, SimServer


def add_options(group: Any) -> None:
    """Of the simulation."""
    add = group.add_argument
    add("--simulate", action="store_true", help="start no server: vLLM's scheduler as a model, in virtual time")
    add("--step-times", type=Path, metavar="FILE", help="what scripts/calibrate.py measured of model and machine")
    add(
        "--sim-speed",
        type=float,
        default=1.0,
        metavar="F",
        help="multiply all measured times: 1.1 is a machine 10 %% slower",
    )
    add(
        "--sim-noise",
        type=float,
        default=0.0,
        metavar="F",
        help="relative standard deviation of a step's time, by --seed and repeat",
    )
    add("--max-num-batched-tokens", type=int, default=2048, metavar="N", help="as of vllm serve, simulated")
    add("--max-num-queued-tokens", type=int, metavar="N", help="as of vllm serve, simulated: beyond it a 503")
    add("--async-scheduling", action="store_true", help="as of vllm serve, simulated")


def check_options(args: argparse.Namespace) -> None:
    """Refuse what would be ignored.

    Raises:
        ReplayError: an option is missing, or belongs to real servers.
    """
    if args.step_times is None or args.out is None:
        raise ReplayError("--simulate needs --step-times FILE (scripts/calibrate.py makes it) and --out DIR.")
    if args.url is not None or args.serve_arg or args.token_ids:
        raise ReplayError("--simulate starts no server: leave out --url, --serve-arg and --token-ids.")


def run_all(comparison: Comparison, args: argparse.Namespace, progress: Progress) -> list[RunResult]:
    """Every run of a comparison, saved like a measured one.

    Raises:
        ReplayError: a comparison that cannot be run.
        ConfigError: of a config, the server's settings, or the calibration.
    """
    from morphserve.simulation import SimServer, load_calibration

    comparison.check()
    calibration = load_calibration(args.step_times)
    what = comparison.measurement
    server = SimServer(
        num_blocks=comparison.server.num_blocks,
        block_size=comparison.server.block_size,
        max_model_len=comparison.server.max_model_len,
        max_num_seqs=comparison.server.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        async_scheduling=args.async_scheduling,
        prefix_caching=comparison.server.prefix_caching,
        max_num_queued_tokens=args.max_num_queued_tokens,
        request_timeout_s=what.client.request_timeout_s,
        cutoff_s=what.client.cutoff_s,
        restore_wait_s=what.restore_wait_s,
        snapshot_s=what.poll_s,
        step_noise=args.sim_noise,
    )
    results = []
    for repeat in range(1, comparison.repeats + 1):
        for name in comparison.names:
            progress.measuring(run_title(comparison, name, repeat), len(what.workload.requests))
            result = _run_one(comparison, name, repeat, server, calibration, args)
            result.save()
            progress.finished(result)
            results.append(result)
    return results


def _run_one(
    comparison: Comparison,
    name: str,
    repeat: int,
    server: SimServer,
    calibration: Calibration,
    args: argparse.Namespace,
) -> RunResult:
    from morphserve.simulation import simulate

    directory = run_directory(comparison, name, repeat)
    config, profile, text = None, None, "no plugin"
    if name != STOCK:
        raw = derived_config(comparison.config_of(name), name, directory)
        config = parse_config(raw)
        profile = read_ladder(config)
        text = yaml.safe_dump(raw, sort_keys=False)
        (directory / "config.yaml").write_text(text, encoding="utf-8")
    if static_format(name):
        server = replace(server, restore_wait_s=0.0)  # it stays where it is
    what = comparison.measurement
    seed = args.seed + repeat - 1
    done = simulate(what.workload, server, config, calibration, speed=args.sim_speed, seed=seed, profile=profile)
    times = calibration.times
    source = f"{args.step_times}, measured with {times.model or 'a model'} on {times.machine or 'a machine'}"
    setup = (comparison.setup or {}) | describe_machine() | {
        "simulated": f"step times {source}, all of them times {args.sim_speed:g}",
        "command": text,
        "step_noise": args.sim_noise,
        "seed": seed,
        "num_steps": done.num_steps,
    }
    return RunResult(name, repeat, directory, what.slo, done.replayed, done.series, done.status, setup)
