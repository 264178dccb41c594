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
import json
import os
import statistics
import sys
import time
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # steps are made, and timed, here
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


class _Wanted:
    """A policy that wants what it is told."""

    level = 0

    def decide(self, signals: Any) -> Any:
        from policies import Decision

        return Decision(self.level, "benchmark")


def main(argv: list[str] | None = None) -> int:
    from quant_layers import FORMATS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--format", choices=list(FORMATS), default="w8")
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--enforce-eager", action="store_true")
    args = parser.parse_args(argv)

    from vllm import LLM, SamplingParams

    step = {"format": args.format, "layers": args.layers, "layers_per_level": args.layers}
    llm = LLM(
        args.model,
        enforce_eager=args.enforce_eager,
        block_size=32,
        num_gpu_blocks_override=257,
        max_model_len=512,
        max_num_seqs=args.concurrency,
        enable_prefix_caching=False,
        disable_log_stats=True,
        additional_config={"morphserve": {"ladder": {"steps": [step]}, "policy": {"kind": "static", "level": 0}}},
    )
    core = llm.llm_engine.engine_core.engine_core
    morph = core.scheduler.morph
    wanted = _Wanted()
    morph.controller._seat._policy = wanted
    sent = 0

    def sampling() -> SamplingParams:
        """Requests end, and the next ones are prefilled, one at a time: 16 prefills in a step are a pause too."""
        return SamplingParams(temperature=0.0, max_tokens=40 + 37 * sent % 360, ignore_eos=True)

    def one_step() -> tuple[float, float]:
        """Seconds of the step, and the worker seconds of commands in it."""
        nonlocal sent
        while llm.llm_engine.get_num_unfinished_requests() < args.concurrency:
            llm.llm_engine.add_request(str(sent), {"prompt_token_ids": [100 + sent % 1000] * 32}, sampling())
            sent += 1
        answered = len(morph.executor.pauses)
        start = time.perf_counter()
        llm.llm_engine.step()
        took = time.perf_counter() - start
        return took, sum(list(morph.executor.pauses)[answered:])

    for _ in range(30):
        one_step()
    plain: list[float] = []
    carried: dict[str, list[float]] = {"in": [], "out": []}
    pauses: dict[str, list[float]] = {"in": [], "out": []}
    spans: dict[str, list[float]] = {"in": [], "out": []}
    for _ in range(args.cycles):
        for direction, level in (("in", 1), ("out", 0)):
            plain += [one_step()[0] for _ in range(10)]
            morph.executor.pauses.clear()
            wanted.level = level
            start = time.perf_counter()
            while morph.controller.level != level or morph.controller.in_transition:
                took, pause = one_step()
                if pause:
                    carried[direction].append(took)
                    pauses[direction].append(pause)
            spans[direction].append(time.perf_counter() - start)
    _report(args, plain, carried, pauses, spans)
    llm.llm_engine.engine_core.shutdown()
    return 0


def _report(
    args: argparse.Namespace,
    plain: list[float],
    carried: dict[str, list[float]],
    pauses: dict[str, list[float]],
    spans: dict[str, list[float]],
) -> None:
    median = statistics.median(plain)
    document: dict[str, Any] = {
        "layers": args.layers,
        "format": args.format,
        "cycles": args.cycles,
        "eager": args.enforce_eager,
        "step_ms_p50": round(1e3 * median, 2),
        "step_ms_max": round(1e3 * max(plain), 2),
    }
    for direction in ("in", "out"):
        worst = max(carried[direction]) / median
        figures = {
            "pause_ms_p50": round(1e3 * statistics.median(pauses[direction]), 2),
            "pause_ms_max": round(1e3 * max(pauses[direction]), 2),
            "transition_ms_p50": round(1e3 * statistics.median(spans[direction]), 1),
            "longest_step_over_median": round(worst, 2),
        }
        document[direction] = figures
        sys.stdout.write(f"{direction:<4} " + "  ".join(f"{k} {v}" for k, v in figures.items()) + "\n")
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
