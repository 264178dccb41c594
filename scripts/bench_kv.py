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
import statistics
import time

from bench_engine import engine_parser, ms, start_engine

from morphserve.integration.offline import LevelEngine
from morphserve.tools.command import finish, say

_PLAIN_STEPS = 12  # before and after each shrink


def main(argv: list[str] | None = None) -> int:
    parser = engine_parser(__doc__, cycles=10)
    parser.add_argument("--blocks", type=int, default=100, help="live blocks to move")
    parser.add_argument("--migrate", type=int, default=16, help="blocks per step; kv.migrate_blocks_per_step")
    args = parser.parse_args(argv)
    with start_engine(
        args.model, {"ladder": {"steps": [{"format": "w8"}]}}, enforce_eager=args.enforce_eager,
        num_gpu_blocks_override=200, max_num_seqs=2 * args.concurrency, enable_prefix_caching=False,
    ) as engine:  # fmt: skip
        rows = [_cycle(engine, args) for _ in range(args.cycles + 1)][1:]  # the first warms up
    for row in rows:
        say(f"moved {row['moved']}  steps {row['steps']}  added {row['added']:.2f}  longest {row['longest']:.2f}")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return finish(
        {
            "cycles": args.cycles,
            "migrate": args.migrate,
            "eager": args.enforce_eager,
            "moved_p50": statistics.median(columns["moved"]),
            "step_ms_p50": ms(columns["median_s"]),
            "added_median_steps_p50": round(statistics.median(columns["added"]), 2),
            "added_median_steps_max": round(max(columns["added"]), 2),
            "longest_step_over_median_p50": round(statistics.median(columns["longest"]), 2),
            "longest_step_over_median_max": round(max(columns["longest"]), 2),
            "longest_plain_step_over_median_max": round(max(columns["longest_plain"]), 2),
        }
    )


def _cycle(engine: LevelEngine, args: argparse.Namespace) -> dict[str, float]:
    size = engine.morph.pool.num_kv_blocks
    for i in range(10):
        engine.add([50 + i] * 320, 2)
    for i in range(args.concurrency):
        engine.add([500 + i] * 200, 300)
    while engine.num_requests > args.concurrency:
        engine.step()
    for _ in range(4):
        engine.step()
    plain = [engine.timed_step() for _ in range(_PLAIN_STEPS)]
    carried, moved = _shrink(engine, _limit(engine, args.blocks), args.migrate)
    plain += [engine.timed_step() for _ in range(_PLAIN_STEPS)]
    engine.abort_all()
    engine.carry_out({}, size)
    engine.morph.pool.grow(size)
    median = statistics.median(plain)
    return {
        "moved": moved,
        "steps": len(carried),
        "added": (sum(carried) - median * len(carried)) / median,
        "longest": max(carried) / median,
        "longest_plain": max(plain) / median,
        "median_s": median,
    }


def _shrink(engine: LevelEngine, limit: int, migrate: int) -> tuple[list[float], int]:
    """Seconds of the steps that carried something, and blocks moved."""
    pool, carried, moved, ended = engine.morph.pool, list[float](), 0, False
    while not ended:
        start = time.perf_counter()
        if not carried:
            pool.begin_shrink(limit)
        progress = pool.advance_shrink(migrate)
        moved += len(progress.copies)
        ended = progress.num_live_tail == 0
        if ended:
            pool.finish_shrink()
        engine.carry_out({}, limit if ended else pool.num_kv_blocks, progress.copies)
        engine.step()
        carried.append(time.perf_counter() - start)
    return carried, moved


def _limit(engine: LevelEngine, num_live: int) -> int:
    """Return the id above which so many live blocks lie."""
    blocks = engine.core.scheduler.kv_cache_manager.block_pool.blocks
    live = sorted((block.block_id for block in blocks[1:] if block.ref_cnt), reverse=True)
    assert len(live) >= num_live, f"{len(live)} blocks are live, --blocks {num_live} are to be moved"
    return live[num_live - 1]


if __name__ == "__main__":
    raise SystemExit(main())
