"""Does the block pool stay right under any order of events? Random operations against a model, as many as you like.

Drives vLLM's real KVCacheManager through allocations, prefix hits, ends and preemptions while the real controller
resizes it on ranks that lag, fail and map less than asked (tests/seams/pool_driver.py says what is checked after
each). Stops at the first difference and names the world to run again.

With --hits it asks instead what a shrink and a grow cost the prefix cache, beside an LRU of the size at each moment.

Output columns: operations so far, seconds, microseconds per operation; with --hits: load, blocks before and in between,
blocks hit right before, right after the shrink and right after the grow, the same for the LRU, blocks copied.
Last stdout line: one JSON document.

    python tests/stress/check_pool.py --operations 10000000 --seed 7
    python tests/stress/check_pool.py --hits
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check-every", type=int, default=50, help="operations between two full comparisons")
    parser.add_argument("--hits", action="store_true", help="prefix hits across a shrink and a grow")
    args = parser.parse_args(argv)
    sys.path[:0] = [str(_ROOT), str(_ROOT / "tests")]
    if args.hits:
        print(json.dumps({"hits": compare_hits()}))
        return 0
    from seams.pool_driver import drive

    logging.disable(logging.WARNING)  # planned aborts are no news
    start, done, part = time.perf_counter(), 0, 0
    counts: Counter[str] = Counter()
    while done < args.operations:
        size = min(100_000, args.operations - done)
        counts += drive(size, seed=args.seed * 1000 + part, check_every=args.check_every)
        done, part = done + size, part + 1
        seconds = time.perf_counter() - start
        print(f"{done:>12,}  {seconds:>9.1f}  {seconds / done * 1e6:>6.1f}", flush=True)
    report = {"seed": args.seed, "seconds": round(time.perf_counter() - start, 1), **dict(sorted(counts.items()))}
    print(json.dumps(report))
    return 0


def compare_hits(full: int = 160, requests: int = 30, seeds: int = 20) -> list[dict[str, Any]]:
    """Hits of `requests` requests before, after the shrink and after the grow, summed over loads of `seeds` seeds."""
    from seams.pool_lru import LruOfBlocks, RealCache, hits_by_phase, recent_prompts, zipf_prompts

    rows = []
    for load in (zipf_prompts, recent_prompts):
        for small in (100, 80, 60):
            sizes = [full] * 6 + [small, full]
            found, ideal, copied = [0, 0, 0], [0, 0, 0], 0
            for seed in range(seeds):
                real = RealCache(full, copies=16)
                for sums, cache in ((found, real), (ideal, LruOfBlocks(full))):
                    hits = hits_by_phase(cache, load(seed), sizes, requests, running=8)[-3:]
                    sums[:] = [a + b for a, b in zip(sums, hits, strict=True)]
                copied += real.num_copied
            row = {"load": load.__name__, "full": full, "small": small, "hits": found, "lru": ideal, "copied": copied}
            print(*row.values(), sep="  ", flush=True)
            rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
