"""Runs on the simulated engine: no servers, the same figures and the same report."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from morphserve.config import MorphServeConfig, load_config
from morphserve.profile_ladder import read_ladder
from morphserve.serve_dtype import AUTO, resolve_dtype
from morphserve.tools.bench.load.measure import Measurement
from morphserve.tools.bench.load.server import LEFT_TO_VLLM
from morphserve.tools.bench.prepared import stored_times, with_prepared
from morphserve.tools.bench.report.results import Observed
from morphserve.tools.bench.runner import Turn
from morphserve.tools.options import add_options, as_flag, given, option
from morphserve.tools.sim import Calibration, ServerSpec, SimServer, load_calibration, simulate
from morphserve.tools.workload import ReplayError


@dataclass(frozen=True, slots=True)
class SimOptions:
    """What is simulated, on which machine."""

    simulate: bool = option("start no server: vLLM's scheduler as a model, in virtual time", default=False)
    sim_speed: float = option("multiply all measured times: 1.1 is a machine 10 %% slower", default=1.0, metavar="F")
    step_times: Path | None = option(
        "what `morphserve calibrate` measured of model and machine", default=None, type=Path, metavar="FILE"
    )
    sim_noise: float | None = option(
        "relative standard deviation of a step's time, by --seed and repeat; default: what the calibration could "
        "not explain; 0 = every step takes what was fitted",
        default=None,
        type=float,
        metavar="F",
    )


def simulation_options(group: Any) -> None:
    """Add what is of a simulation, or is refused without one."""
    add_options(group, SimOptions)
    add_options(group, ServerSpec, only=LEFT_TO_VLLM)


def _given(args: argparse.Namespace) -> list[str]:
    return [*given(args, SimOptions), *given(args, ServerSpec, only=LEFT_TO_VLLM)]


def check_options(args: argparse.Namespace) -> None:
    """Refuse what would be ignored, with and without --simulate.

    Raises:
        ReplayError: an option is missing, or belongs to the other kind of run.
    """
    if not args.simulate:
        if found := _given(args):
            raise ReplayError(
                f"{', '.join(found)} is of a simulation. Add --simulate; a real server takes vLLM's own options "
                "through --serve-arg."
            )
        return
    if args.step_times is None and args.model:
        cache_dir = (MorphServeConfig() if args.config is None else load_config(args.config)).cache_dir
        dtype = resolve_dtype(args.dtype or AUTO, args.model)
        args.step_times = stored_times(
            cache_dir, args.model, dtype, enforce_eager=args.enforce_eager, cpu_bind=args.cpu_bind
        )
    if args.step_times is None or args.out is None:
        raise ReplayError(
            "--simulate needs --step-times FILE, or a --model that `morphserve prepare` has timed here, and --out DIR."
        )
    url = getattr(args, "url", None)  # a sweep has none
    if any((url, args.serve_arg, args.token_ids, args.top_logprobs, args.temperature)):
        raise ReplayError(
            "--simulate starts no server: leave out --url, --serve-arg, --token-ids, --top-logprobs and --temperature."
        )


def check_beside_servers(args: argparse.Namespace) -> None:
    """Refuse what only one of two would get, where servers are measured and simulated side by side.

    Raises:
        ReplayError: names the options.
    """
    if args.sim_speed != 1.0:
        raise ReplayError("--sim-speed is of a simulation without servers. Add --simulate, or leave it out.")
    found = _given(args)
    if found and args.step_times is None:
        raise ReplayError(f"{', '.join(found)} is of a simulation: add --step-times FILE.")
    words = [argument.partition("=")[0] for argument in args.serve_arg]
    if both := sorted(set(words) & set(map(as_flag, LEFT_TO_VLLM))):
        raise ReplayError(f"--serve-arg {', '.join(both)}: give it as an option of its own, to have it simulated too.")


@dataclass(frozen=True, slots=True)
class SimulatedEngine:
    """Implements `Backend` in virtual time; nothing is written but configs."""

    calibration: Calibration
    source: str  # of the calibration, for people
    step_noise: float
    speed: float = 1.0  # multiplies all step times
    seed: int = 0  # of their noise in the first repeat; each further one has the next

    def run(self, turn: Turn) -> Observed:
        """Simulate the server of this run."""
        file = turn.comparison.write_config(turn.name, turn.directory)
        what, seed = turn.measurement, self.seed + turn.repeat - 1
        server = sim_server(turn.comparison.server, what, self.step_noise)
        config = None if file is None else with_prepared(load_config(file), self.calibration, server)
        profile = None if config is None else read_ladder(config)
        done = simulate(what.workload, server, config, self.calibration, speed=self.speed, seed=seed, profile=profile)
        setup = {
            "simulated": f"step times {self.source}, all of them times {self.speed:g}",
            "command": "no plugin" if file is None else file.read_text(encoding="utf-8"),
            "step_noise": self.step_noise,
            "seed": seed,
            "num_steps": done.num_steps,
        }
        return Observed(done.replayed, done.series, done.status, setup)


def load_engine(args: argparse.Namespace) -> SimulatedEngine:
    """Read the calibration of `--step-times`.

    Raises:
        ConfigError: it cannot be read.
    """
    calibration = load_calibration(args.step_times)
    times = calibration.times
    source = f"{args.step_times}, measured with {times.model or 'a model'} on {times.machine or 'a machine'}"
    noise = times.scatter if args.sim_noise is None else args.sim_noise
    return SimulatedEngine(calibration, source, noise, args.sim_speed, args.seed)


def sim_server(spec: ServerSpec, what: Measurement, step_noise: float) -> SimServer:
    """Return the server of a comparison, simulated.

    Raises:
        ConfigError: a time that is none.
    """
    return SimServer(
        **{field.name: getattr(spec, field.name) for field in fields(ServerSpec)},
        request_timeout_s=what.client.request_timeout_s,
        cutoff_s=what.client.cutoff_s,
        restore_wait_s=what.restore_wait_s,
        snapshot_s=what.poll_s,
        step_noise=step_noise,
    )
