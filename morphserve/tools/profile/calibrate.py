"""Command line of scripts/calibrate.py: times the steps of an engine, format by format."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from morphserve import cpu_tier
from morphserve.config import MorphServeConfig, load_config
from morphserve.control.ladder import ladder_formats, optional_formats
from morphserve.errors import MorphServeError
from morphserve.serve_dtype import add_dtype_option, resolve_dtype
from morphserve.tools.bench.environment import describe_machine
from morphserve.tools.profile.step_time_fit import fit_step_time
from policies.step_times import LayerMove, StepTimes
from policies.types import BASE_FORMAT, Decision, StepLoad

_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_MAX_LONG_SEQS = 32  # more sequences are timed with short contexts only: KV for them would be half a server's
_DECODE_STEPS = 8
_WARM_STEPS = 2
_MAX_STEPS_OF_A_MOVE = 200  # of two live requests; a move takes a step for every few layers
_PREFILLS = (16, 48, 128, 320)


def main(argv: list[str] | None = None, description: str = "How long does a step take?") -> int:
    """See scripts/calibrate.py."""
    args = _parser(description).parse_args(argv)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's loop is here, where steps are timed
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", args.cpu_bind)
    try:
        document = _calibrate(args)
    except (MorphServeError, ValueError) as e:
        sys.stderr.write(f"calibrate: {e}\n")
        return 1
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="calibrate", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--config", type=Path, required=True, help="MorphServe YAML: whose formats are timed")
    parser.add_argument("--out", type=Path, help="file to write; default: step_times.json in the config's profile")
    parser.add_argument("--rounds", type=int, default=3, help="times that each format is visited, interleaved")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--enforce-eager", action="store_true", help="as the server that the figures are for")
    add_dtype_option(parser)
    parser.add_argument("--cpu-bind", default="0", metavar="CORES", help="cores of the engine")
    parser.add_argument(
        "--no-server", action="store_true", help="do not start a server: no figure for what lies outside of the steps"
    )
    return parser


def _calibrate(args: argparse.Namespace) -> dict[str, Any]:
    config = load_config(args.config)
    out = args.out or (config.profile / "step_times.json" if config.profile else None)
    if out is None:
        raise MorphServeError("--out FILE is needed: the config has no profile that the figures could go into.")
    if args.rounds < 1:
        raise MorphServeError(f"--rounds is {args.rounds}, must be at least 1.")
    args.dtype = resolve_dtype(args.dtype, args.model)
    engine = _TimedEngine(args, config)
    try:
        for _ in range(args.rounds):
            for level in range(len(engine.formats)):
                engine.go_to(level)
                engine.visit()
        engine.go_to(0)
        fits = {fmt: fit_step_time(engine.steps[fmt]) for fmt in engine.formats}
        times = StepTimes(
            formats={fmt: fit for fmt, (fit, _) in fits.items()},
            move=engine.move(),
            residuals={fmt: round(error, 4) for fmt, (_, error) in fits.items()},
            model=str(args.model),
            machine=str(describe_machine().get("cpu", "")),
            dtype=engine.dtype,
            tier=cpu_tier.tier() or "",
        )
        calibration = engine.with_bytes(times)
    finally:
        engine.close()
    calibration.save(out)  # at once: minutes of timed steps must not be lost to a server that does not start
    if not args.no_server:
        calibration = _as_served(args, calibration)
        calibration.save(out)
    for fmt, (fit, error) in fits.items():
        sys.stdout.write(
            f"{fmt:<6} {1e3 * fit.base_s:.2f} ms + {1e3 * fit.per_seq_s:.3f} ms/sequence + "
            f"{1e6 * fit.per_prefill_token_s:.1f} us/prefill token + {1e6 * fit.per_context_token_s:.3f} us/context "
            f"token, error {error:.1%} of {len(engine.steps[fmt])} steps\n"
        )
    ratios = {fmt: engine.ratios(fmt) for fmt in engine.formats[1:]}
    for fmt, by_batch in ratios.items():
        spans = ", ".join(f"{batch}: {mid:.2f} ({low:.2f}-{high:.2f})" for batch, (mid, low, high) in by_batch.items())
        sys.stdout.write(f"{fmt:<6} decode step over full precision's, by sequences: {spans}\n")
    return {
        "out": str(out),
        "residuals": calibration.times.residuals,
        "offset_ms": round(1e3 * calibration.times.offset_s, 2),
        "move_ms": [round(1e3 * s, 3) for s in (calibration.times.move.degrade_s, calibration.times.move.restore_s)],
        "step_ratios": {
            fmt: {batch: [round(ratio, 3) for ratio in spread] for batch, spread in by_batch.items()}
            for fmt, by_batch in ratios.items()
        },
        "num_steps": {fmt: len(engine.steps[fmt]) for fmt in engine.formats},
    }


class _Wanted:
    """A policy that wants what it is told."""

    level = 0

    def decide(self, signals: Any) -> Decision:
        return Decision(self.level, "calibration")


class _TimedEngine:
    """An engine whose levels are: all layers in the base format, then all in each format of the ladder."""

    def __init__(self, args: argparse.Namespace, config: MorphServeConfig) -> None:
        from vllm import LLM

        from morphserve.profile_ladder import read_ladder
        from quant_layers import FORMATS

        profile = read_ladder(config)
        halves = [half for fmt in ladder_formats(config.ladder, profile) for half in fmt.split("/")]
        own = dict.fromkeys(half for half in halves if half != BASE_FORMAT)
        formats = sorted(own, key=lambda fmt: -FORMATS[fmt].bits)
        optional = optional_formats(config.ladder, profile)
        settings = config.model_dump(mode="json", exclude={"policy", "decision_log", "kv"})
        settings["ladder"] = {
            "steps": [{"format": f, "layers_per_level": 1_000_000, "optional": f in optional} for f in formats]
        }
        settings["policy"] = {"kind": "static", "level": 0}
        longest = args.max_model_len - 2 * _DECODE_STEPS - 16
        self._lengths = (16, max(longest // 2, 16))
        blocks = _MAX_LONG_SEQS * -(-(self._lengths[-1] + 2 * _DECODE_STEPS + 8) // args.block_size) + 2
        self._llm = LLM(
            args.model,
            dtype=args.dtype or "auto",
            enforce_eager=args.enforce_eager,
            block_size=args.block_size,
            num_gpu_blocks_override=max(blocks, -(-args.max_model_len // args.block_size) + 1),
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            enable_prefix_caching=False,
            disable_log_stats=True,
            # As a server has it: while the worker computes, the engine's process polls for its answer. On cores that
            # share a unit that costs nearly half of the speed (two vCPUs of one core: 65 ms a step of 16, 32 without).
            distributed_executor_backend="mp",
            additional_config={"morphserve": settings},
        )
        self._engine = self._llm.llm_engine
        self.dtype = str(self._engine.model_config.dtype).removeprefix("torch.")
        core = self._engine.engine_core.engine_core
        self._morph = core.scheduler.morph
        served = self._morph.runtime.ranks[0].kernels
        self.formats = (BASE_FORMAT, *(fmt for fmt in formats if fmt in served))  # level by level
        self.steps: dict[str, list[StepLoad]] = {fmt: [] for fmt in self.formats}
        self._decodes: dict[tuple[str, int], list[float]] = {}  # medians, in the order of the visits
        self._wanted = _Wanted()
        self._morph.controller.replace_policy(self._wanted, "calibration", self._morph.setup)
        self._seconds = 0.0
        self._step_of_core = core.step_fn
        core.step_fn = self._timed
        self._moves: dict[str, list[float]] = {"degrade": [], "restore": []}
        self._sent = 0
        self._block_size = args.block_size
        self._level = 0

    def _timed(self) -> Any:
        start = time.perf_counter()
        result = self._step_of_core()
        self._seconds = time.perf_counter() - start
        return result

    def go_to(self, level: int) -> None:
        """Switch all layers, under two live requests, and note what a layer takes."""
        if level == self._level:
            return
        controller, executor = self._morph.controller, self._morph.executor
        self._add(2, 32, 400)
        executor.pauses.clear()
        before = controller.counters.num_layers_switched
        self._wanted.level = level
        for _ in range(_MAX_STEPS_OF_A_MOVE):
            if controller.level == level and not controller.in_transition:
                break
            self._engine.step()
        else:
            raise MorphServeError(
                f"level {level} not reached in {_MAX_STEPS_OF_A_MOVE} steps ({controller.status()['errors']}). The log "
                "above says what failed; calibrate again when that is repaired."
            )
        switched = controller.counters.num_layers_switched - before
        self._moves["degrade" if level > self._level else "restore"].append(sum(executor.pauses) / max(switched, 1))
        self._level = level
        self._drain()

    def visit(self) -> None:
        """Time steps of all kinds at the level that the engine is at."""
        fmt = self.formats[self._level]
        for batch in _BATCHES:
            for length in self._lengths[: 1 if batch > _MAX_LONG_SEQS else None]:
                self._add(batch, length, _DECODE_STEPS + _WARM_STEPS)
                self._record(fmt, _DECODE_STEPS)
                decodes = [step.seconds for step in self.steps[fmt][-_DECODE_STEPS:] if not step.prefill_tokens]
                self._decodes.setdefault((fmt, batch), []).append(statistics.median(decodes))
                self._drain()
        for beside in (1, 8):
            self._add(beside, 64, 4 * len(_PREFILLS) + 8)
            self._record(None, 2)
            for tokens in _PREFILLS:
                if tokens < self._lengths[-1] * 2:
                    self._add(1, tokens, 3)
                    self._record(fmt, 3)
            self._drain()

    def ratios(self, fmt: str) -> dict[int, tuple[float, float, float]]:
        """Sequences |-> what a decode step takes over one in full precision of the same round: median, least, most."""
        found = {}
        for batch in _BATCHES:
            pairs = zip(self._decodes[fmt, batch], self._decodes[BASE_FORMAT, batch], strict=True)
            of_rounds = [here / base for here, base in pairs]
            found[batch] = (statistics.median(of_rounds), min(of_rounds), max(of_rounds))
        return found

    def _record(self, fmt: str | None, count: int) -> None:
        for _ in range(count):
            self._engine.step()
            step = self._morph.monitor.last_step
            if fmt is not None and step is not None:
                self.steps[fmt].append(
                    StepLoad(self._seconds, step.num_seqs, step.prefill_tokens, step.context_tokens, self._level)
                )

    def _add(self, count: int, num_tokens: int, max_tokens: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        for _ in range(count):
            self._sent += 1
            prompt = [100 + (self._sent * 31 + i) % 1000 for i in range(num_tokens)]
            self._engine.add_request(str(self._sent), {"prompt_token_ids": prompt}, params)

    def _drain(self) -> None:
        self._engine.abort_request([str(number) for number in range(max(self._sent - 64, 0), self._sent + 1)])
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def move(self) -> LayerMove:
        """Median seconds per layer, each way."""
        return LayerMove(*(statistics.median(self._moves[way] or [0.0]) for way in ("degrade", "restore")))

    def with_bytes(self, times: StepTimes) -> Any:
        """Together with what the ranks' layers weigh."""
        from morphserve.tools.sim.calibration import Calibration

        rank = self._morph.runtime.rank_bytes[0]
        layers = {fmt: tuple(rank.layers[fmt]) for fmt in self.formats}
        return Calibration(times, type(rank)(layers, rank.kv_block_bytes), len(layers[BASE_FORMAT]), self._block_size)

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def _as_served(args: argparse.Namespace, calibration: Any) -> Any:
    """What a server adds outside of the steps, between the client and the queue and back."""
    from dataclasses import replace

    from morphserve.tools.bench.load.server import ServerOptions, serve

    options = ServerOptions(
        model=str(args.model),
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        block_size=args.block_size,
        num_blocks=257,
        dtype=args.dtype,
        enforce_eager=args.enforce_eager,
        cpu_bind=args.cpu_bind,
    )
    with tempfile.TemporaryDirectory() as folder, serve(options, Path(folder) / "server.log") as server:
        alone = list(_requests(server.url, 12, 48, 24))[2:]
    base = calibration.times.formats[BASE_FORMAT]
    ttft_s = statistics.median(ttft for ttft, _ in alone)
    offset_s = max(ttft_s - base.seconds(1, 47, 48), 0.0)
    return replace(calibration, times=replace(calibration.times, offset_s=offset_s))


def _requests(url: str, count: int, num_tokens: int, max_tokens: int) -> Iterator[tuple[float, float]]:
    """One after another: seconds to the first token, and per further token."""
    import urllib.request

    for number in range(count):
        body = {
            "model": "demo", "prompt": [100 + (number * 31 + i) % 1000 for i in range(num_tokens)],
            "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        start = time.perf_counter()
        arrivals = []
        with urllib.request.urlopen(request, timeout=60) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    arrivals.append(time.perf_counter() - start)
        yield arrivals[0], (arrivals[-1] - arrivals[0]) / max(len(arrivals) - 1, 1)
