"""What does the controller cost per engine step, and does that grow with uptime? No engine, no clock but one.

Drives the real controller, monitor and policy through simulated steps of a load that comes and goes, with ranks that
answer at the next step, and times every tick. Kind slo learns its step times unless --step-times has them.

With --decision-log the decisions are written too. Pace the steps then, as an engine's are: else the writer has to keep
up with steps of 10 us. Compare with `--decision-log off` at the same pace: a core that has rested is slower. --gzip
writes them compressed.

Output columns: microseconds (upper edge of the bucket), steps in it; then the median of the first and the last tenth.
Last stdout line: one JSON document.

    python scripts/bench_controller.py --steps 100000
    python scripts/bench_controller.py --steps 1000 --decision-log all --pace-ms 5
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from morphserve.config import LadderConfig, LadderStep, MorphServeConfig
from morphserve.control import (
    Controller,
    DecisionLog,
    EngineView,
    Monitor,
    Plan,
    RankBytes,
    Reply,
    ShrinkProgress,
    WaitingRequest,
    build_ladder,
    largest_batch_bytes,
    make_header,
    make_ledgers,
)
from morphserve.tools.command import command_parser, fail, finish, say
from policies import EngineLimits, PolicySetup, SloConfig, ThresholdConfig, load_step_times

EDGES_US = (2, 5, 10, 20, 50, 100, 200, 500, 1000)
LAYER_BYTES = {"base": [7_077_888] * 30, "w8": [3_585_000] * 30, "w4": [2_270_000] * 30}
BLOCK_BYTES = 737_280
STEP_S = 0.04


@dataclass
class Pool:
    """Counts instead of blocks."""

    num_kv_blocks: int
    num_used_blocks: int = 0
    fence: int = 0

    def grow(self, num_kv_blocks: int) -> None:
        self.num_kv_blocks = num_kv_blocks

    def begin_shrink(self, num_kv_blocks: int) -> None:
        self.fence = num_kv_blocks

    def advance_shrink(self, max_copies: int) -> ShrinkProgress:
        return ShrinkProgress((), max(0, self.num_used_blocks - self.fence))

    def finish_shrink(self) -> None:
        self.num_kv_blocks = self.fence

    def cancel_shrink(self) -> None:
        self.fence = 0

    def discard_contents(self) -> None:
        raise AssertionError("no rank fails here")


class Ticket:
    """Answered when it is looked at for the second time: one step later."""

    def __init__(self, replies: tuple[Reply, ...]) -> None:
        self._replies = replies
        self._looked = False

    def poll(self) -> tuple[Reply, ...] | None:
        looked, self._looked = self._looked, True
        return self._replies if looked else None


class Executor:
    """Two ranks that do what they are told, in no time."""

    num_ranks = 2
    in_background = False

    def _answer(self, plan: Plan) -> Ticket:
        return Ticket(tuple(Reply(r, plan.revision, True, num_kv_blocks=plan.num_kv_blocks) for r in range(2)))

    prepare = commit = abort = _answer


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--kind", choices=["threshold", "slo"], default="threshold", help="of the policy")
    parser.add_argument("--step-times", type=Path, metavar="FILE", help="of kind slo, as calibrated")
    parser.add_argument("--decision-log", choices=["off", "changes", "all"], default="off")
    parser.add_argument("--gzip", action="store_true", help="compress the decision log")
    parser.add_argument("--pace-ms", type=float, default=0.0, help="wait so long after each step")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        return _drive(args, Path(directory) / ("decisions.jsonl.gz" if args.gzip else "decisions.jsonl"))


def _drive(args: argparse.Namespace, log_file: Path) -> int:
    config = MorphServeConfig()
    ranks = [RankBytes(LAYER_BYTES, BLOCK_BYTES)] * 2
    ladder = build_ladder(30, ranks, LadderConfig(steps=[LadderStep(format=fmt) for fmt in ("w8", "w4")]), 49)
    pool, monitor, now = Pool(49), Monitor(), [0.0]
    section = SloConfig(kind="slo") if args.kind == "slo" else ThresholdConfig(kind="threshold")
    times = None if args.step_times is None else load_step_times(args.step_times)
    setup = PolicySetup(section, times, EngineLimits(32, 64, 2048))
    log = None
    if args.decision_log != "off":
        log = DecisionLog(log_file, make_header(setup, ladder, detail=args.decision_log))
    controller = Controller(
        ladder,
        setup.build(ladder),
        pool,
        Executor(),
        monitor,
        config,
        make_ledgers(ladder, ranks, [largest_batch_bytes(LAYER_BYTES, 5)] * 2),
        ranks=ranks,
        clock=lambda: now[0],
        log=log,
    )
    cpu_s = time.process_time() - time.thread_time()
    took_us: list[float] = []
    for step in range(args.steps):
        now[0] += STEP_S
        running = 4 if step // 1000 % 2 == 0 else 18  # a burst of 40 s every 80 s
        pool.num_used_blocks = min(running * 8, pool.num_kv_blocks - 1)
        start = time.perf_counter()
        if step % 20 == 0:
            monitor.on_arrival(now[0], WaitingRequest(str(step), 400))
        if step % 20 == 5:
            monitor.on_scheduled(now[0], 0.2, str(step - 5))
            monitor.on_finish(8, now[0], "", 100)
        monitor.on_step(now[0], running, running, 0, 2000, controller.level)
        controller.tick(EngineView(0, running, 0.0))
        took_us.append(1e6 * (time.perf_counter() - start))
        if args.pace_ms:
            time.sleep(args.pace_ms / 1e3)
    if log is not None:
        log.close()
    cpu_s = time.process_time() - time.thread_time() - cpu_s
    if controller.failed:
        return fail("bench_controller", "the controller failed")
    more = {
        "kind": args.kind,
        "decision_log": args.decision_log,
        "gzip": args.gzip,
        "writer_us_per_step": round(1e6 * cpu_s / args.steps, 2),
        "bytes_per_step": round(log_file.stat().st_size / args.steps, 1) if log else 0,
        "dropped": log.num_dropped if log else 0,
    }
    return _report(took_us, sum(controller.counters.transitions.values()), more)


def _report(took_us: list[float], num_transitions: int, more: dict[str, object]) -> int:
    counts = [0] * (len(EDGES_US) + 1)
    for value in took_us:
        counts[next((i for i, edge in enumerate(EDGES_US) if value <= edge), len(EDGES_US))] += 1
    labels = [*(f"<= {edge}" for edge in EDGES_US), f"> {EDGES_US[-1]}"]
    for label, count in zip(labels, counts, strict=True):
        say(f"{label:>8} us  {count}")
    tenth = max(1, len(took_us) // 10)
    first, last = statistics.median(took_us[:tenth]), statistics.median(took_us[-tenth:])
    say(f"median of the first tenth {first:.2f} us, of the last {last:.2f} us")
    document = {
        "steps": len(took_us),
        "transitions": num_transitions,
        "p50_us": round(statistics.median(took_us), 2),
        "p99_us": round(statistics.quantiles(took_us, n=100)[98], 2),
        "p999_us": round(statistics.quantiles(took_us, n=1000)[998], 2),
        "first_tenth_p50_us": round(first, 2),
        "last_tenth_p50_us": round(last, 2),
        "histogram": dict(zip(labels, counts, strict=True)),
        **more,
    }
    return finish(document)


if __name__ == "__main__":
    raise SystemExit(main())
