"""Does the block pool stay right under any order of events? Random operations against a model, as many as you like.

Drives vLLM's real KVCacheManager through allocations, prefix hits, ends and preemptions while the real controller
resizes it on ranks that lag, fail and map less than asked (tests/seams/pool_driver.py says what is checked after
each). Stops at the first difference and names the world to run again.

Output columns: operations so far, seconds, microseconds per operation.
Last stdout line: one JSON document.

    python scripts/check_pool.py --operations 10000000 --seed 7
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check-every", type=int, default=50, help="operations between two full comparisons")
    args = parser.parse_args(argv)
    sys.path[:0] = [str(_ROOT), str(_ROOT / "tests")]
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


if __name__ == "__main__":
    sys.exit(main())
