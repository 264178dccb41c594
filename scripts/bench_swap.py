"""What does a request notice of a swap? Step times while 15 layers go to W8 and come back, under load.

Runs an engine in this process with live requests that never wait, swaps the first LAYERS decoder layers in and out
again and again, and times every engine step. A step that carried a command is compared with the steps that did not.

Output columns: direction, pause p50 and max (worker milliseconds between two forward passes), transition p50 (ms from
the decision to the last layer), longest step that carried a command over the median step.
Last stdout line: one JSON document.

    python scripts/bench_swap.py MODEL_DIR --layers 15 --cycles 20
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field

from bench_engine import engine_parser, ms, start_engine

from morphserve.integration.offline import LevelEngine
from morphserve.tools.command import finish, say

_WARM_STEPS = 30
_PLAIN_STEPS = 10  # before each swap


@dataclass
class _Way:
    """Swaps in one direction; seconds."""

    level: int
    carried: list[float] = field(default_factory=list)  # steps that carried a command
    pauses: list[float] = field(default_factory=list)  # what the worker took of them
    spans: list[float] = field(default_factory=list)  # from the decision to the last layer

    def figures(self, plain_s: float) -> dict[str, float]:
        """Return the columns, `plain_s` being the median step without a command."""
        return {
            "pause_ms_p50": ms(self.pauses),
            "pause_ms_max": ms([max(self.pauses)]),
            "transition_ms_p50": ms(self.spans, 1),
            "longest_step_over_median": round(max(self.carried) / plain_s, 2),
        }


def main(argv: list[str] | None = None) -> int:
    from quant_layers import FORMATS

    parser = engine_parser(__doc__, cycles=20)
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--format", choices=list(FORMATS), default="w8")
    args = parser.parse_args(argv)
    step = {"format": args.format, "layers": args.layers, "layers_per_level": args.layers}
    with start_engine(
        args.model, {"ladder": {"steps": [step]}}, enforce_eager=args.enforce_eager, num_gpu_blocks_override=257,
        max_num_seqs=args.concurrency, enable_prefix_caching=False,
    ) as engine:  # fmt: skip
        plain, ways = _measure(engine, args)
    document = {
        "layers": args.layers, "format": args.format, "cycles": args.cycles, "eager": args.enforce_eager,
        "step_ms_p50": ms(plain), "step_ms_max": ms([max(plain)]),
    }  # fmt: skip
    for direction, way in ways.items():
        document[direction] = figures = way.figures(statistics.median(plain))
        say(f"{direction:<4} " + "  ".join(f"{k} {v}" for k, v in figures.items()))
    return finish(document)


def _measure(engine: LevelEngine, args: argparse.Namespace) -> tuple[list[float], dict[str, _Way]]:
    """Seconds of the plain steps, and what swapping in and out took."""
    ways = {"in": _Way(1), "out": _Way(0)}
    for _ in range(_WARM_STEPS):
        _step(engine, args.concurrency)
    plain: list[float] = []
    for _ in range(args.cycles):
        for way in ways.values():
            plain += [_step(engine, args.concurrency)[0] for _ in range(_PLAIN_STEPS)]
            engine.morph.executor.pauses.clear()
            engine.want(way.level)
            start = time.perf_counter()
            while not engine.is_at(way.level):
                took, pause = _step(engine, args.concurrency)
                if pause:
                    way.carried.append(took)
                    way.pauses.append(pause)
            way.spans.append(time.perf_counter() - start)
    return plain, ways


def _step(engine: LevelEngine, concurrency: int) -> tuple[float, float]:
    """Seconds of one step under load, and the worker seconds of commands in it."""
    while engine.num_requests < concurrency:
        # Requests end, and the next ones are prefilled, one at a time: 16 prefills in a step are a pause too.
        engine.add([100 + engine.num_added % 1000] * 32, 40 + 37 * engine.num_added % 360)
    pauses = engine.morph.executor.pauses
    answered = len(pauses)
    took = engine.timed_step()
    return took, sum(list(pauses)[answered:])


if __name__ == "__main__":
    raise SystemExit(main())
