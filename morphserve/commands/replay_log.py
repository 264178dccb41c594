"""Does a policy, asked the same again, answer the same? Reads a decision log of `decision_log_detail: all`.

Builds the policies from what the log says, and feeds them the logged signals. No engine, no torch: it runs anywhere.
With --policy the `policy:` section of another config is asked the same. That is an open loop: the signals are those
that the logged decisions led to, so it says where the two disagree, not what a server with that policy would have lived
through (`morphserve replay` does).

Exit status 0 when every decision agrees and nothing is missing, else 1. Last stdout line: one JSON document.

    morphserve replay-log decisions.jsonl.gz
    morphserve replay-log decisions.jsonl.gz --policy slo.yaml
"""

from __future__ import annotations

from collections.abc import Sequence

from morphserve.shipped import config_file
from morphserve.tools.command import command_parser


def main(argv: Sequence[str] | None = None, prog: str = "morphserve replay-log") -> int:
    """Replay the log and print what came of it; returns the exit status."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("file", help="written with `decision_log_detail: all`")
    parser.add_argument(
        "--policy", metavar="YAML", type=config_file, help="ask this file's policy instead, and show where it differs"
    )
    args = parser.parse_args(argv)
    from morphserve.control import print_replay

    return print_replay(args.file, None if args.policy is None else str(args.policy))
