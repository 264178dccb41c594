"""Empty a server before maintenance: new requests get a 503, it goes to level 0, and what runs is served to its end.

It is empty once `drained` is true in the last line, the state as JSON, or in GET /morphserve/admin/state.

    morphserve drain --cause "kernel update" --token-file admin.token
"""

from __future__ import annotations

from collections.abc import Sequence

from morphserve.tools.admin.client import add_for, order_parser, run_order


def main(argv: Sequence[str] | None = None, prog: str = "morphserve drain") -> int:
    """Drain the server; returns the exit status."""
    parser = order_parser(__doc__, prog)
    add_for(parser, "until `morphserve resume` where it is left out")
    return run_order("drain", parser.parse_args(argv), prog)
