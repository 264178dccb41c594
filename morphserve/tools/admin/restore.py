"""Bring a server back to level 0 now, whatever its policy wants. Then the policy decides again.

What finds no room within a minute, or --for, is given up. The last line is the state as JSON.

    morphserve restore --token-file admin.token
"""

from __future__ import annotations

from collections.abc import Sequence

from morphserve.tools.admin.client import add_for, order_parser, run_order


def main(argv: Sequence[str] | None = None, prog: str = "morphserve restore") -> int:
    """Restore level 0; returns the exit status."""
    parser = order_parser(__doc__, prog)
    add_for(parser, "60 s where it is left out")
    return run_order("restore", parser.parse_args(argv), prog)
