"""Can MorphServe run here, in which dtype and formats? Versions, every vLLM symbol that it touches, every kernel.

Needs no model. Exit status 0 when a server with the plugin and the default ladder can start here, else 1.

    morphserve check
    morphserve check --dtype bfloat16 --json
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from morphserve.tools.command import command_parser


def main(argv: Sequence[str] | None = None, prog: str = "morphserve check") -> int:
    """Print what was found; returns the exit status."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"],
        help="that a server is to have; auto = the one that serves best on this CPU",
    )  # fmt: skip
    args = parser.parse_args(argv)
    # Read as torch is loaded: threads that wait in a loop would time, and slow down, whatever else has the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from morphserve.integration.offline.check import check

    return check(args.dtype, args.json)
