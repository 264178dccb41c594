"""How long does an engine step take, at every level? A few minutes of timed steps, fitted to a model.

Runs MODEL in an engine whose loop is in this process and whose worker has its own, as in a server. With all layers in
each format of the config's ladder in turn it times steps with 1 to 64 sequences, short and long contexts, with and
without a prefill among them. Fits, per format,

    seconds = base + per_seq * sequences + per_prefill_token * tokens + per_context_token * KV tokens

and measures what switching a layer takes, and what a server adds outside of the steps. Writes one JSON file: the
`slo` policy predicts with it, `morphserve simulate` and `morphserve tune` run on it.

Output columns: format, the four coefficients, root mean square of the relative error; then, per format, what a decode
step takes over one in full precision of the same round, by sequences: median (least to most).
Last stdout line: one JSON document.

    morphserve calibrate MODEL_DIR --config demo --out step_times.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphserve.config import MorphServeConfig, load_config
from morphserve.errors import MorphServeError
from morphserve.hub import local_files
from morphserve.prepared import weights_fingerprint
from morphserve.serve_dtype import add_dtype_option, resolve_dtype
from morphserve.shipped import config_file
from morphserve.tools.apart import add_bind_option, add_parallel_options, bind_cores, counter, parallel_arguments
from morphserve.tools.bench import ServerOptions, serve
from morphserve.tools.checks import at_least, check_new_file
from morphserve.tools.command import command_parser, fail, finish
from morphserve.tools.profile.step_time_fit import fit_step_time
from morphserve.tools.sim import Calibration
from morphserve.user_input import user_path
from policies import BASE_FORMAT, StepTimes

if TYPE_CHECKING:
    from morphserve.integration.offline.timed_engine import TimedEngine

_LONE_TOKENS = 48  # of the prompts that a server is asked one by one


def main(argv: Sequence[str] | None = None, prog: str = "morphserve calibrate") -> int:
    """Time the steps and write the file; returns the exit status."""
    args = _parser(prog).parse_args(argv)
    args.cpu_bind = bind_cores(args)
    try:
        document = _calibrate(args)
    except (MorphServeError, ValueError, OSError) as e:
        return fail(prog, e)
    return finish(document)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("model")
    parser.add_argument(
        "--config", type=config_file, help="MorphServe YAML: whose formats are timed; default: all defaults"
    )
    parser.add_argument("--out", type=Path, help="file to write; default: step_times.json in the config's profile")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="times that each format is visited, interleaved")
    parser.add_argument("--block-size", type=at_least(1), default=32)
    parser.add_argument("--max-model-len", type=at_least(2), default=512)
    parser.add_argument("--max-num-seqs", type=at_least(1), default=64, help="of the largest step that is timed")
    parser.add_argument("--max-num-batched-tokens", type=at_least(1), help="prompts are timed up to that; default: "
                        "vLLM's own")  # fmt: skip
    parser.add_argument("--enforce-eager", action="store_true", help="as the server that the figures are for")
    add_parallel_options(parser)
    add_dtype_option(parser)
    add_bind_option(parser)
    parser.add_argument(
        "--no-server", action="store_true", help="do not start a server: no figure for what lies outside of the steps"
    )
    return parser


def _calibrate(args: argparse.Namespace) -> dict[str, Any]:
    config = MorphServeConfig() if args.config is None else load_config(args.config)
    out = args.out or (config.profile / "step_times.json" if config.profile else None)
    if out is None:
        raise MorphServeError("--out FILE is needed: the config has no profile that the figures could go into.")
    out = user_path(out)
    check_new_file(out, "--out")
    args.dtype = resolve_dtype(args.dtype, args.model)
    engine = _timed(args, config)
    calibration = _fitted(args, engine)
    calibration.save(out)  # at once: minutes of timed steps must not be lost to a server that does not start
    if not args.no_server:
        calibration = _as_served(args, calibration)
        calibration.save(out)
    ratios = {fmt: engine.ratios(fmt) for fmt in engine.formats[1:]}
    _show(engine, calibration.times, ratios)
    move = calibration.times.move
    return {
        "out": str(out),
        "place": asdict(engine.place),
        "residuals": calibration.times.residuals,
        "offset_ms": round(1e3 * calibration.times.offset_s, 2),
        "move_ms": [round(1e3 * s, 3) for s in (move.degrade_s, move.restore_s)],
        "step_ratios": {
            fmt: {batch: [round(ratio, 3) for ratio in spread] for batch, spread in by_batch.items()}
            for fmt, by_batch in ratios.items()
        },
        "num_steps": {fmt: len(engine.steps[fmt]) for fmt in engine.formats},
    }


def _timed(args: argparse.Namespace, config: MorphServeConfig) -> TimedEngine:
    """Return an engine that has timed its steps in all formats, and is closed."""
    from morphserve.integration.offline.timed_engine import TimedEngine  # loads torch: after the variables are set

    more = {} if args.max_num_batched_tokens is None else {"max_num_batched_tokens": args.max_num_batched_tokens}
    with TimedEngine(
        str(args.model), config, block_size=args.block_size, max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs, dtype=args.dtype or "auto", enforce_eager=args.enforce_eager,
        **parallel_arguments(args), **more,
    ) as engine:  # fmt: skip
        count = counter(args.rounds * len(engine.formats))
        for _ in range(args.rounds):
            for level in range(len(engine.formats)):
                engine.go_to(level)
                engine.visit()
                count()
        engine.go_to(0)
    return engine


def _fitted(args: argparse.Namespace, engine: TimedEngine) -> Calibration:
    """Return what the steps say about the engine, and what its layers weigh."""
    fits = {fmt: fit_step_time(engine.steps[fmt]) for fmt in engine.formats}
    times = StepTimes(
        formats={fmt: fit for fmt, (fit, _) in fits.items()},
        move=engine.move(),
        residuals={fmt: round(error, 4) for fmt, (_, error) in fits.items()},
        model=str(args.model),
        machine=engine.place.device,
        dtype=engine.place.dtype,
        tier=engine.place.tier,
        cores=engine.place.cores,
    )
    rank = engine.rank_bytes()
    directory = local_files(args.model)
    weights = None if directory is None else weights_fingerprint(directory)
    return Calibration(times, rank, len(rank.layers[BASE_FORMAT]), args.block_size, weights or "")


def _show(engine: TimedEngine, times: StepTimes, ratios: dict[str, dict[int, tuple[float, float, float]]]) -> None:
    for fmt, fit in times.formats.items():
        sys.stdout.write(
            f"{fmt:<6} {1e3 * fit.base_s:.2f} ms + {1e3 * fit.per_seq_s:.3f} ms/sequence + "
            f"{1e6 * fit.per_prefill_token_s:.1f} us/prefill token + {1e6 * fit.per_context_token_s:.3f} us/context "
            f"token, error {times.residuals[fmt]:.1%} of {len(engine.steps[fmt])} steps\n"
        )
    for fmt, by_batch in ratios.items():
        spans = ", ".join(f"{batch}: {mid:.2f} ({low:.2f}-{high:.2f})" for batch, (mid, low, high) in by_batch.items())
        sys.stdout.write(f"{fmt:<6} decode step over full precision's, by sequences: {spans}\n")


def _as_served(args: argparse.Namespace, calibration: Calibration) -> Calibration:
    """Measure what a server adds outside of the steps, between the client and the queue and back."""
    options = ServerOptions(
        model=str(args.model),
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        block_size=args.block_size,
        num_blocks=257,
        dtype=args.dtype,
        enforce_eager=args.enforce_eager,
        cpu_bind=args.cpu_bind,
        extra_args=("-tp", str(args.tensor_parallel_size), "-pp", str(args.pipeline_parallel_size)),
    )
    with tempfile.TemporaryDirectory() as folder, serve(options, Path(folder) / "server.log") as server:
        ttfts_s = [_lone_ttft_s(server.url, number) for number in range(12)][2:]
    base = calibration.times.formats[BASE_FORMAT]
    offset_s = max(statistics.median(ttfts_s) - base.seconds(1, _LONE_TOKENS - 1, _LONE_TOKENS), 0.0)
    return replace(calibration, times=replace(calibration.times, offset_s=offset_s))


def _lone_ttft_s(url: str, number: int) -> float:
    """Seconds to the first token of a request that is alone and answered whole."""
    import urllib.request

    from morphserve.tools.watch import open_url

    body = {
        "model": "demo", "prompt": [100 + (number * 31 + i) % 1000 for i in range(_LONE_TOKENS)],
        "max_tokens": 24, "temperature": 0.0, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    start = time.perf_counter()
    with open_url(request, 60.0) as response:
        arrivals = [time.perf_counter() - start for line in response if line.startswith(b"data: {")]
    return arrivals[0]


if __name__ == "__main__":
    raise SystemExit(main())
