"""End what an operator has ordered: a pin, a maximum, a pause, a drain. The policy decides again, the door opens.

The last line is the state as JSON.

    morphserve resume --token-file admin.token
"""

from __future__ import annotations

from collections.abc import Sequence

from morphserve.tools.admin.client import order_parser, run_order


def main(argv: Sequence[str] | None = None, prog: str = "morphserve resume") -> int:
    """Resume; returns the exit status."""
    return run_order("resume", order_parser(__doc__, prog).parse_args(argv), prog, ())
