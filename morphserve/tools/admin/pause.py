"""Let a server stay at the level that it has, or is on its way to, until it is told to resume.

It serves on. The last line is the state as JSON.

    morphserve pause --for 900 --cause "kernel update" --token-file admin.token
"""

from __future__ import annotations

from collections.abc import Sequence

from morphserve.tools.admin.client import add_for, order_parser, run_order


def main(argv: Sequence[str] | None = None, prog: str = "morphserve pause") -> int:
    """Pause morphing; returns the exit status."""
    parser = order_parser(__doc__, prog)
    add_for(parser, "until `morphserve resume` where it is left out")
    return run_order("pause", parser.parse_args(argv), prog)
