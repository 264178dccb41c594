"""What does a request notice of a shrinking KV cache? Step times while live blocks are moved and memory is given back.

Runs an engine in this process. Each cycle fills the low blocks with requests that end, starts CONCURRENCY requests
that live in the blocks above, then takes the tail away in which BLOCKS live blocks lie: migration in steps of MIGRATE
blocks, as the controller does it, and the unmapping. Every engine step is timed, with what is done between two steps;
those that carried copies or the unmapping are compared with the plain ones of the same cycle.

Output columns: blocks moved, steps that carried something, time added in median steps, longest step over the median.
Last stdout line: one JSON document.

    python scripts/bench_kv.py MODEL_DIR --blocks 100 --cycles 10
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

_PLAIN_STEPS = 12  # before and after each shrink


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--blocks", type=int, default=100, help="live blocks to move")
    parser.add_argument("--migrate", type=int, default=16, help="blocks per step; kv.migrate_blocks_per_step")
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--enforce-eager", action="store_true")
    args = parser.parse_args(argv)

    from vllm import LLM

    llm = LLM(
        args.model,
        enforce_eager=args.enforce_eager,
        block_size=32,
        num_gpu_blocks_override=200,
        max_model_len=512,
        max_num_seqs=2 * args.concurrency,
        enable_prefix_caching=False,
        disable_log_stats=True,
        additional_config={
            "morphserve": {"ladder": {"steps": [{"format": "w8"}]}, "policy": {"kind": "static", "level": 0}}
        },
    )
    rows = [_cycle(llm, args, number) for number in range(args.cycles + 1)][1:]  # the first warms up
    llm.llm_engine.engine_core.shutdown()
    for row in rows:
        sys.stdout.write(
            f"moved {row['moved']}  steps {row['steps']}  added {row['added']:.2f}  longest {row['longest']:.2f}\n"
        )
    document = {
        "cycles": args.cycles,
        "migrate": args.migrate,
        "eager": args.enforce_eager,
        "moved_p50": statistics.median(row["moved"] for row in rows),
        "step_ms_p50": round(1e3 * statistics.median(row["median_s"] for row in rows), 2),
        "added_median_steps_p50": round(statistics.median(row["added"] for row in rows), 2),
        "added_median_steps_max": round(max(row["added"] for row in rows), 2),
        "longest_step_over_median_p50": round(statistics.median(row["longest"] for row in rows), 2),
        "longest_step_over_median_max": round(max(row["longest"] for row in rows), 2),
        "longest_plain_step_over_median_max": round(max(row["longest_plain"] for row in rows), 2),
    }
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


def _cycle(llm: Any, args: argparse.Namespace, number: int) -> dict[str, float]:
    engine = llm.llm_engine
    morph = engine.engine_core.engine_core.scheduler.morph
    pool, size = morph.pool, morph.pool.num_kv_blocks
    asked = [f"{number}-{i}" for i in range(args.concurrency)]
    for i in range(10):
        engine.add_request(f"{number}-filler-{i}", {"prompt_token_ids": [50 + i] * 320}, _params(2))
    for i, name in enumerate(asked):
        engine.add_request(name, {"prompt_token_ids": [500 + i] * 200}, _params(300))
    while engine.get_num_unfinished_requests() > len(asked):
        engine.step()
    for _ in range(4):
        engine.step()
    plain = [_timed(engine.step) for _ in range(_PLAIN_STEPS)]
    limit = _limit(pool, args.blocks)
    carried, moved = _shrink(engine, morph, limit, args.migrate)
    plain += [_timed(engine.step) for _ in range(_PLAIN_STEPS)]
    engine.abort_request(asked)
    while engine.has_unfinished_requests():
        engine.step()
    _commit(morph, (), size)
    pool.grow(size)
    median = statistics.median(plain)
    return {
        "moved": moved,
        "steps": len(carried),
        "added": (sum(carried) - median * len(carried)) / median,
        "longest": max(carried) / median,
        "longest_plain": max(plain) / median,
        "median_s": median,
    }


def _shrink(engine: Any, morph: Any, limit: int, migrate: int) -> tuple[list[float], int]:
    """Seconds of the steps that carried something, and blocks moved."""
    carried, moved = [], 0
    begun = False
    while True:

        def between() -> bool:
            nonlocal begun, moved
            if not begun:
                morph.pool.begin_shrink(limit)
                begun = True
            step = morph.pool.advance_shrink(migrate)
            moved += len(step.copies)
            ends = step.num_live_tail == 0
            if ends:
                morph.pool.finish_shrink()
            _commit(morph, step.copies, limit if ends else morph.pool.num_kv_blocks)
            return ends

        start = time.perf_counter()
        ended = between()
        engine.step()
        carried.append(time.perf_counter() - start)
        if ended:
            return carried, moved


def _commit(morph: Any, copies: Any, num_kv_blocks: int) -> None:
    from morphserve.control import Plan

    replies = morph.executor.commit(Plan(0, (), num_kv_blocks, copies)).poll()
    assert replies is not None and all(reply.ok for reply in replies), replies


def _limit(pool: Any, num_live: int) -> int:
    """The id above which so many live blocks lie."""
    live = sorted((b.block_id for b in pool._pool.blocks[1:] if b.ref_cnt), reverse=True)
    assert len(live) >= num_live, f"{len(live)} blocks are live, --blocks {num_live} are to be moved"
    return live[num_live - 1]


def _timed(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _params(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


if __name__ == "__main__":
    raise SystemExit(main())
