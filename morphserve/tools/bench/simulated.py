"""A comparison without servers: every run on the simulated engine, the same figures and the same report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from morphserve.config import parse_config
from morphserve.profile_ladder import read_ladder
from morphserve.tools.bench.compare import (
    STOCK,
    Comparison,
    Progress,
    derived_config,
    run_directory,
    run_title,
    static_format,
)
from morphserve.tools.bench.report.results import RunResult
from morphserve.tools.machine import describe_machine
from morphserve.tools.workload import ReplayError

if TYPE_CHECKING:  # it builds on this package
    from morphserve.tools.sim import Calibration, SimServer


_SERVER_OPTIONS = ("max_num_batched_tokens", "max_num_queued_tokens", "async_scheduling")  # of vllm serve, too


def add_options(group: Any) -> None:
    """Of the simulation."""
    add = group.add_argument
    add("--simulate", action="store_true", help="start no server: vLLM's scheduler as a model, in virtual time")
    add(
        "--sim-speed",
        type=float,
        default=1.0,
        metavar="F",
        help="multiply all measured times: 1.1 is a machine 10 %% slower",
    )
    model_options(group)


def model_options(group: Any) -> None:
    """Of the simulated server and machine."""
    add = group.add_argument
    add("--step-times", type=Path, metavar="FILE", help="what scripts/calibrate.py measured of model and machine")
    add(
        "--sim-noise",
        type=float,
        metavar="F",
        help="relative standard deviation of a step's time, by --seed and repeat; default: what the calibration could "
        "not explain; 0 = every step takes what was fitted",
    )
    add("--max-num-batched-tokens", type=int, default=2048, metavar="N", help="as of vllm serve, simulated")
    add("--max-num-queued-tokens", type=int, metavar="N", help="as of vllm serve, simulated: beyond it a 503")
    add("--async-scheduling", action="store_true", help="as of vllm serve, simulated")


def check_options(args: argparse.Namespace) -> None:
    """Refuse what would be ignored, with and without --simulate.

    Raises:
        ReplayError: an option is missing, or belongs to the other kind of run.
    """
    if not args.simulate:
        if given := _given(args, add_options):
            raise ReplayError(
                f"{', '.join(given)} is of a simulation. Add --simulate; a real server takes vLLM's own options "
                "through --serve-arg."
            )
        return
    if args.step_times is None or args.out is None:
        raise ReplayError("--simulate needs --step-times FILE (scripts/calibrate.py makes it) and --out DIR.")
    if getattr(args, "url", None) is not None or args.serve_arg or args.token_ids:  # a sweep has no --url
        raise ReplayError("--simulate starts no server: leave out --url, --serve-arg and --token-ids.")


def check_model_options(args: argparse.Namespace) -> None:
    """Where servers are measured and simulated side by side: refuse what only one of them would get.

    Raises:
        ReplayError: names the options.
    """
    given = _given(args, model_options)
    if given and args.step_times is None:
        raise ReplayError(f"{', '.join(given)} is of a simulation: add --step-times FILE.")
    words = [argument.partition("=")[0] for argument in args.serve_arg]
    if both := sorted(set(words) & {f"--{name.replace('_', '-')}" for name in _SERVER_OPTIONS}):
        raise ReplayError(f"--serve-arg {', '.join(both)}: give it as an option of its own, to have it simulated too.")


def server_arguments(args: argparse.Namespace) -> list[str]:
    """What a real server must be told to be the simulated one: the options that were given."""
    arguments = []
    for option in _given(args, model_options):
        name = option.removeprefix("--").replace("-", "_")
        if name in _SERVER_OPTIONS:
            value = getattr(args, name)
            arguments += [option] if value is True else [option, str(value)]
    return arguments


def _given(args: argparse.Namespace, add: Callable[[Any], None]) -> list[str]:
    """Options of a group that differ from their defaults."""
    parser = argparse.ArgumentParser()
    add(parser)
    unset = vars(parser.parse_args([]))
    return [f"--{name.replace('_', '-')}" for name in unset if getattr(args, name) != unset[name]]


def run_all(comparison: Comparison, args: argparse.Namespace, progress: Progress) -> list[RunResult]:
    """Every run of a comparison, saved like a measured one.

    Raises:
        ReplayError: a comparison that cannot be run.
        ConfigError: of a config, the server's settings, or the calibration.
    """
    comparison.check(is_simulated=True)
    model = load_model(comparison, args)
    results = []
    for repeat in range(1, comparison.repeats + 1):
        for name in comparison.names:
            progress.measuring(run_title(comparison, name, repeat), len(comparison.measurement.workload.requests))
            directory = run_directory(comparison, name, repeat)
            result = run_one(comparison, name, repeat, directory, model, args.sim_speed, args.seed + repeat - 1)
            result.save()
            progress.finished(result)
            results.append(result)
    return results


@dataclass(frozen=True, slots=True)
class SimModel:
    """A machine, a model and the server on it."""

    server: SimServer
    calibration: Calibration
    source: str  # where the calibration is from


def load_model(comparison: Comparison, args: argparse.Namespace) -> SimModel:
    """The server of a comparison, at the step times of `--step-times`.

    Raises:
        ConfigError: of the server's settings, or the calibration.
    """
    from morphserve.tools.sim import load_calibration

    calibration = load_calibration(args.step_times)
    times = calibration.times
    server = server_of(comparison, args, times.scatter if args.sim_noise is None else args.sim_noise)
    source = f"{args.step_times}, measured with {times.model or 'a model'} on {times.machine or 'a machine'}"
    return SimModel(server, calibration, source)


def server_of(comparison: Comparison, args: argparse.Namespace, step_noise: float) -> SimServer:
    """The server of a comparison, simulated.

    Raises:
        ConfigError: settings that vLLM would refuse.
    """
    from morphserve.tools.sim import SimServer

    what = comparison.measurement
    return SimServer(
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
        step_noise=step_noise,
    )


def run_one(
    comparison: Comparison, name: str, repeat: int, directory: Path, model: SimModel, speed: float, seed: int
) -> RunResult:
    """One run on a simulated server; nothing is saved but its config.

    Args:
        directory: for the config; made if it is not there.
        speed: multiplies all step times.
        seed: of their noise.

    Raises:
        ConfigError: a config that the server would refuse.
        WorkloadError: a request that it would refuse.
    """
    from morphserve.tools.sim import simulate

    config, profile, text = None, None, "no plugin"
    if name != STOCK:
        raw = derived_config(comparison.config_of(name), name, directory, comparison.promise)
        config = parse_config(raw)
        profile = read_ladder(config)
        text = yaml.safe_dump(raw, sort_keys=False)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(text, encoding="utf-8")
    server = model.server
    if static_format(name):
        server = replace(server, restore_wait_s=0.0)  # it stays where it is
    what = comparison.measurement
    done = simulate(what.workload, server, config, model.calibration, speed=speed, seed=seed, profile=profile)
    setup = (comparison.setup or {}) | describe_machine() | {
        "simulated": f"step times {model.source}, all of them times {speed:g}",
        "command": text,
        "step_noise": server.step_noise,
        "seed": seed,
        "num_steps": done.num_steps,
    }
    return RunResult(name, repeat, directory, what.slo, done.replayed, done.series, done.status, setup)
