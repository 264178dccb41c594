"""Is a policy better than the best level that never changes? Some 200 windows of public traces, in virtual time.

Windows of 72 s from a cold start: conversations, bursts (arrivals of the code trace, lengths of conversations), code,
Mooncake's mix, and synthetic ones (short prompts, long answers, long prompts, longer windows, other gaps), each at 0.5
to 3 times the step times of one of the machines given. Every other window is held out: whoever tunes a policy looks at
`--part tune` alone.

With `--gpu` some 60 windows of the shape of an 8B on one GPU that its weights nearly fill: the Azure traces as they
are, at 1 to 4 times their rate, and synthetic ones; four levels of fp8, assumed to cost up to 0.01 nats a token; step
times learned, as without settings.

With `--whole` the whole conversation trace, half an hour, of which every 5th, 6th, 7th and 8th request is sent, on each
machine; with `--gpu`, too, all of it at 1, 1.5, 2, 2.5 and 3 times its rate. It has no parts.

Policies: `stock`, `slo`, `threshold`, `static:LEVEL` (a level of the ladder, `w8` or `deepest`); with `@FILE` the
`policy:` of that YAML. The demo model's shipped profile makes the ladder; `--no-profile` leaves it out.

Output columns: policy, requests, late (%), nats per token, windows in which it is more than two points later than the
best `static:` of the run, windows in which it is dearer than `static:w8` (`static:fp8`) and saves nobody.
Last stdout line: one JSON document.

    python scripts/compare_policies.py --traces DIR --step-times FAST.json --step-times SLOW.json --part held \
        slo static:w8 static:deepest
    python scripts/compare_policies.py --whole --traces DIR --step-times FAST.json --step-times SLOW.json stock slo
    python scripts/compare_policies.py --gpu --traces DIR --step-times docs/results/step_times_like_h200.json stock slo
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from morphserve.config import parse_config
from morphserve.errors import ConfigError
from morphserve.profile_ladder import read_ladder
from morphserve.tools.command import command_parser, run_command
from morphserve.tools.sim import SimServer, load_calibration, simulate
from morphserve.tools.workload import Slo, Workload, WorkloadError, WorkloadSpec, load_workload

_CONV, _CODE = "azure2023/AzureLLMInferenceTrace_conv.csv", "azure2023/AzureLLMInferenceTrace_code.csv"
_MOONCAKE = "mooncake/synthetic_trace.jsonl"
_LENGTHS: dict[str, Any] = {"input_scale": 1 / 16, "input_clip": (8, 120), "output_clip": (4, 384)}
_WHOLE_LENGTHS: dict[str, Any] = {"input_clip": (1, 4000), "output_clip": (1, 1000)}  # those of a GPU
_SPEEDS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
_WHOLE_THIN = (5.0, 6.0, 7.0, 8.0)
_WHOLE_RATES = (1.0, 1.5, 2.0, 2.5, 3.0)
_FEWEST = 6  # requests of a window
Families = Sequence[tuple[str, int, Callable[[Path, int], Workload]]]  # name, how many, what makes the i-th
_SYNTHETIC = (
    "synthetic:{seed},duration={duration},rate={rate:g},cv={cv:g},burst={burst},burst_s={burst_s},calm_s={calm_s},"
    "input={input},output={output},output_sigma={sigma}{gaps}"
)
_PROFILES = Path(__file__).resolve().parents[1] / "morphserve/prepared/shipped"


@dataclass(frozen=True, slots=True)
class Window:
    """One workload on one machine. `speed` multiplies its step times."""

    name: str
    workload: Workload
    machine: int  # of the step times given
    speed: float


@dataclass(frozen=True, slots=True)
class Shape:
    """What is simulated: an engine, what its clients were promised, and the ladder."""

    server: SimServer
    slo: Slo
    ladder: dict[str, Any]  # settings; a profile's goes before them
    with_profile: bool = False


_CPU = Shape(
    SimServer(num_blocks=49, block_size=32, max_model_len=512), Slo(), {"expected_kl": {"w8": 0.0289, "w4": 0.3061}}
)
_GPU = Shape(
    SimServer(
        num_blocks=3100, block_size=16, max_model_len=8192, max_num_seqs=256, max_num_batched_tokens=8192,
        async_scheduling=True,
    ),
    Slo(1.3, 0.068),
    {"steps": [{"format": "fp8", "layers_per_level": 8}], "expected_kl": {"fp8": 0.01}},
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """What became of the requests of a window under a policy."""

    requests: int
    late: int
    tokens: int
    nats_per_token: float


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("policies", nargs="+")
    parser.add_argument("--traces", type=Path, required=True, help="directory with azure2023/ and mooncake/")
    parser.add_argument("--step-times", type=Path, action="append", required=True, help="of a machine; repeatable")
    parser.add_argument("--part", choices=("tune", "held", "all"), default="tune")
    parser.add_argument("--every", type=int, default=1, help="take every K-th window of the part")
    parser.add_argument("--seed", type=int, default=0, help="of the scatter of steps")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--gpu", action="store_true", help="windows, engine and promises of a GPU")
    parser.add_argument("--whole", action="store_true", help="the conversation trace as a whole")
    args = parser.parse_args(argv)
    return run_command("compare_policies", lambda: _compare(args), "nothing is kept")


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    if args.gpu and len(args.step_times) > 1:
        raise ConfigError(f"--gpu has windows of one machine, --step-times names {len(args.step_times)}. Give one.")
    windows = _chosen(args)
    found: dict[str, list[Found]] = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        for policy in args.policies:
            shape = _GPU if args.gpu else replace(_CPU, with_profile=not args.no_profile)
            run = partial(_run, policy, shape, tuple(args.step_times), args.seed)
            found[policy] = list(pool.map(run, windows, chunksize=2))
            print(f"{policy}: {len(windows)} windows", file=sys.stderr, flush=True)
    rows = {policy: _row(policy, found) for policy in found}
    for policy, row in rows.items():
        print(f"{policy}  {'  '.join(str(value) for value in row.values())}")
    by_window = {
        window.name: {policy: [runs[i].late, runs[i].nats_per_token] for policy, runs in found.items()}
        for i, window in enumerate(windows)
    }
    return {
        "part": "all" if args.whole else args.part,
        "every": args.every,
        "windows": len(windows),
        "policies": rows,
        "requests_of": {window.name: len(window.workload.requests) for window in windows},
        "by_window": by_window,
    }


def _chosen(args: argparse.Namespace) -> Sequence[Window]:
    if args.whole:
        return list(_whole_trace(args.traces, args.gpu, len(args.step_times)))
    find = _gpu_windows(args.traces) if args.gpu else _windows(args.traces, len(args.step_times))
    part = {"tune": slice(0, None, 2), "held": slice(1, None, 2), "all": slice(None)}[args.part]
    return list(find)[part][:: args.every]


def _row(policy: str, found: dict[str, list[Found]]) -> dict[str, Any]:
    runs = found[policy]
    requests, tokens = sum(run.requests for run in runs), max(1, sum(run.tokens for run in runs))
    static = [[run.late for run in each] for name, each in found.items() if name.startswith("static:")]
    best = [min(each) for each in zip(*static, strict=True)]
    beside_w8 = list(zip(runs, found.get("static:w8") or found.get("static:fp8", []), strict=False))
    return {
        "requests": requests,
        "late_percent": round(100 * sum(run.late for run in runs) / requests, 2),
        "nats_per_token": round(sum(run.nats_per_token * run.tokens for run in runs) / tokens, 4),
        "much_later": sum(run.late - late > 0.02 * run.requests for run, late in zip(runs, best, strict=False)),
        "dearer_for_nothing": sum(
            run.nats_per_token > w8.nats_per_token and run.late >= w8.late for run, w8 in beside_w8
        ),
    }


def _run(policy: str, shape: Shape, step_times: tuple[Path, ...], seed: int, window: Window) -> Found:
    """Simulate a window under a policy."""
    calibration = load_calibration(step_times[window.machine])
    server = replace(shape.server, step_noise=calibration.times.scatter)
    config, ladder = _settings(policy, shape)
    done = simulate(window.workload, server, config, calibration, speed=window.speed, seed=seed, profile=ladder)
    late = round(done.violation_rate(shape.slo) * len(window.workload.requests))
    tokens = sum(done.tokens_by_level.values()) or sum(request.generated for request in done.requests)
    return Found(len(window.workload.requests), late, tokens, done.expected_kl_per_token or 0.0)


def _settings(policy: str, shape: Shape) -> tuple[Any, Any]:
    """Return the configuration and the profile's ladder, None and None for a stock server."""
    if policy == "stock":
        return None, None
    kind, _, level = policy.partition(":")
    section: dict[str, Any] = {"kind": kind} | ({"level": level} if level else {})
    if kind == "slo":
        section |= {"ttft_s": shape.slo.ttft_s, "tpot_s": shape.slo.tpot_s}
    if policy.startswith("@"):
        section = yaml.safe_load(Path(policy[1:]).read_text(encoding="utf-8"))["policy"]
    settings: dict[str, Any] = {"policy": section, "prepared": False, "ladder": shape.ladder}
    if shape.with_profile:
        settings["profile"] = str(next(_PROFILES.glob("*/profile-*")))
    config = parse_config(settings)
    return config, read_ladder(config) if shape.with_profile else None


def _windows(traces: Path, num_machines: int) -> Iterator[Window]:
    """Give all windows, always the same ones in the same order."""
    families: Families = (
        ("conv", 56, _conversation), ("hyb", 40, _burst), ("code", 24, _code), ("moon", 24, _mooncake),
        ("syn", 56, _synthetic),
    )  # fmt: skip
    for number, (name, workload) in enumerate(_workloads(families, traces)):
        # Pairs, so that both halves meet each machine and speed.
        machine, speed = number // 2 % num_machines, _SPEEDS[number * 3 // 2 % len(_SPEEDS)]
        yield Window(f"{name}/{machine}x{speed:g}", workload, machine, speed)


def _whole_trace(traces: Path, is_gpu: bool, num_machines: int) -> Iterator[Window]:
    """Give the conversation trace as a whole, at each load on each machine."""
    specs: dict[str, dict[str, Any]] = {f"{thin:g}": _LENGTHS | {"thin": thin} for thin in _WHOLE_THIN}
    if is_gpu:
        specs = {f"{rate:g}": _WHOLE_LENGTHS | {"rate_scale": rate} for rate in _WHOLE_RATES}
    for machine in range(num_machines):
        for name, spec in specs.items():
            yield Window(f"{name}/{machine}", load_workload(WorkloadSpec(traces / _CONV, **spec)), machine, 1.0)


def _workloads(families: Families, traces: Path) -> Iterator[tuple[str, Workload]]:
    """Give each family's workloads, but those in which hardly anybody arrives."""
    for family, count, make in families:
        for i in range(count):
            try:
                workload = make(traces, i)
            except WorkloadError:  # nobody arrives in it
                continue
            if len(workload.requests) >= _FEWEST:
                yield f"{family}{i}", workload


def _conversation(traces: Path, i: int) -> Workload:
    thin = (2.6, 3.4, 4.75, 6.0)[i // 2 % 4]
    return load_workload(WorkloadSpec(traces / _CONV, window_s=(15.0 + 31.0 * i, 72.0), thin=thin, **_LENGTHS))


def _burst(traces: Path, i: int) -> Workload:
    thin = (5.0, 7.0, 9.0, 12.0)[i // 2 % 4]
    arrivals = load_workload(WorkloadSpec(traces / _CODE, window_s=(20.0 + 43.0 * i, 72.0), thin=thin, **_LENGTHS))
    return _with_lengths(arrivals, traces, (37.0 * i % 1400, 300.0), _LENGTHS, f"hyb{i}")


def _with_lengths(
    arrivals: Workload, traces: Path, window_s: tuple[float, float], lengths: dict[str, Any], name: str
) -> Workload:
    """Give arrivals the lengths of conversations."""
    conversations = load_workload(WorkloadSpec(traces / _CONV, window_s=window_s, **lengths))
    requests = tuple(
        replace(arrival, input_tokens=length.input_tokens, output_tokens=length.output_tokens)
        for arrival, length in zip(arrivals.requests, conversations.requests, strict=False)
    )
    return Workload(name, requests, arrivals.block_tokens)


def _code(traces: Path, i: int) -> Workload:
    spec = WorkloadSpec(
        traces / _CODE, window_s=(30.0 + 71.0 * i, 72.0), thin=(6.0, 10.0, 16.0)[i % 3], input_scale=1 / 8,
        input_clip=(40, 440), output_clip=(4, 70),
    )  # fmt: skip
    return load_workload(spec)


def _mooncake(traces: Path, i: int) -> Workload:
    spec = WorkloadSpec(
        traces / _MOONCAKE, window_s=(10.0 + 40.0 * i, 72.0), thin=(1.5, 2.2, 3.0, 4.0)[i // 2 % 4],
        input_scale=1 / 128, input_clip=(8, 250), output_clip=(4, 250),
    )  # fmt: skip
    return load_workload(spec)


def _synthetic(_: Path, i: int) -> Workload:
    draw = random.Random(i)
    rate, shape = draw.choice([0.6, 0.9, 1.2, 1.6, 2.2]), {"input": 50, "output": 120, "sigma": 0.8, "duration": 72}
    times, more = (
        (1.0, {}), (3.0, {"input": 16, "output": 60}), (0.6, {"output": 250}), (2.0, {"input": 110, "output": 40}),
        (1.0, {}), (1.0, {"duration": 180}), (1.3, {"input": 12, "output": 150, "sigma": 0.3}),
    )[i % 7]  # fmt: skip
    text = _SYNTHETIC.format(
        **shape | more, seed=100 + i, rate=rate * times, cv=draw.choice([1.0, 1.5, 3.0]),
        burst=draw.choice([1, 3, 6, 10]), burst_s=draw.choice([4, 8, 15]), calm_s=draw.choice([12, 24, 40]),
        gaps=",gaps=weibull" if i % 7 == 4 else "",
    )  # fmt: skip
    return load_workload(WorkloadSpec(Path(text), input_clip=(4, 120), output_clip=(4, 384)))


def _gpu_windows(traces: Path) -> Iterator[Window]:
    """Give all windows of a GPU's shape, likewise. The halves are of other minutes of the traces."""
    families: Families = (("conv", 20, _fast_conversation), ("hyb", 16, _fast_burst), ("syn", 24, _fast_synthetic))
    for name, workload in _workloads(families, traces):
        yield Window(name, workload, 0, 1.0)


def _fast_conversation(traces: Path, i: int) -> Workload:
    rate = (1.75, 2.25, 2.75, 3.25, 4.0)[i % 5]
    window_s = (15 + 900.0 * (i % 2) + 60 * (i // 2), 72.0 * rate)
    return load_workload(WorkloadSpec(traces / _CONV, window_s=window_s, rate_scale=rate, **_WHOLE_LENGTHS))


def _fast_burst(traces: Path, i: int) -> Workload:
    rate = (1.0, 1.5, 2.0, 3.0)[i // 2 % 4]
    window_s = (20 + 850.0 * (i % 2) + 80 * (i // 2), 72.0 * rate)
    arrivals = load_workload(WorkloadSpec(traces / _CODE, window_s=window_s, rate_scale=rate, **_WHOLE_LENGTHS))
    return _with_lengths(arrivals, traces, (37.0 * i % 600, 380.0 * rate), _WHOLE_LENGTHS, f"hyb{i}")


def _fast_synthetic(_: Path, i: int) -> Workload:
    draw = random.Random(i)
    rate = draw.choice([4, 7, 10, 14])
    times, lengths = (
        (1.0, {"input": 1000, "output": 210}), (2.0, {"input": 200, "output": 120}),
        (0.6, {"input": 1000, "output": 450}), (1.5, {"input": 2000, "output": 60}),
    )[i // 2 % 4]  # fmt: skip
    text = _SYNTHETIC.format(
        **lengths, sigma=0.8, duration=72, seed=100 + i, rate=rate * times, cv=draw.choice([1, 1.5, 3]),
        burst=draw.choice([1, 2, 3, 5]), burst_s=draw.choice([4, 8, 15]), calm_s=draw.choice([12, 24, 40]), gaps="",
    )  # fmt: skip
    return load_workload(WorkloadSpec(Path(text), **_WHOLE_LENGTHS))


if __name__ == "__main__":
    sys.exit(main())
