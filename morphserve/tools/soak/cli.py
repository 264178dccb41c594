"""Does anything add up in hours of morphing, and is every answer right?

Starts two servers of a small model, with and without the plugin, and sends both the same bursts by turns: streams,
whole answers with receipts, clients that go away. Each burst takes the level down, and it comes back up within it. The
model's answers are known, and the same at every level (`morphserve/tools/soak/recall.py` says why): each token is held
against the right one. Once a minute, at rest, a row of what the processes of both take goes to DIR/samples.jsonl.
Slopes are of what comes behind the warm-up, with their standard error, stock's beside them.

Output columns: minutes, transitions, answers with and without the plugin, lost and wrong ones, resident MiB of engine
core and API server with the plugin, and without. Last stdout line: one JSON document. The exit status is 1 if anything
is lost or wrong, or memory, open files or ticks grow beyond their limits.

    morphserve soak --minutes 120 --out DIR
    morphserve soak --read DIR                # what a run has left, also one that is under way
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morphserve.tools.checks import more_than_zero
from morphserve.tools.command import command_parser, run_command, say
from morphserve.tools.machine import describe_machine
from morphserve.tools.soak.judge import report
from morphserve.tools.soak.run import POLICIES, Plan, read_rows, run


def main(argv: Sequence[str] | None = None, prog: str = "morphserve soak") -> int:
    """Soak; returns the exit status."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("--minutes", type=more_than_zero, default=120.0)
    parser.add_argument("--warm-up", type=more_than_zero, metavar="MIN", help="that slopes leave out; default: half")
    parser.add_argument("--share", type=more_than_zero, default=0.4, help="of the time in which requests are under way")
    parser.add_argument("--kind", choices=tuple(POLICIES), default="threshold", help="of the policy")
    parser.add_argument("--out", type=Path, metavar="DIR", help="logs and samples; default: a temporary directory")
    parser.add_argument("--read", type=Path, metavar="DIR", help="judge what a run has left there; start nothing")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}

    def job() -> dict[str, Any]:
        directory = args.read
        if directory is None:
            directory = (args.out or Path(tempfile.mkdtemp(prefix="morphserve-soak-"))).resolve()
            directory.mkdir(parents=True, exist_ok=True)
            say(f"samples and logs: {directory}")
            asyncio.run(run(Plan(directory, args.minutes, min(1.0, args.share), args.kind, args.seed)))
        rows = list(read_rows(directory))
        warm_up = args.warm_up or max(row.get("t_s", 0.0) for row in rows) / 120
        found.update({"machine": describe_machine(), **report(rows, warm_up)})
        return found

    return run_command(prog, job, "the rows so far are kept") or int(bool(found["violations"]))
