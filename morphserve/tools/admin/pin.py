"""Hold a server at a level, or let it go no deeper, for so long. After that its policy decides again.

A level is an index of the ladder, 8bit, 4bit and the like, deepest, or a format, as `max_level` of the policy. What is
deeper than the policy's max_level, or its quality budget allows, is refused. The last line is the state as JSON.

    morphserve pin 8bit --for 600 --cause "release test" --token-file admin.token
    morphserve pin 0 --max --for 3600 --token-file admin.token
"""

from __future__ import annotations

from collections.abc import Sequence

from morphserve.tools.admin.client import add_for, order_parser, run_order


def main(argv: Sequence[str] | None = None, prog: str = "morphserve pin") -> int:
    """Pin a level or a maximum; returns the exit status."""
    parser = order_parser(__doc__, prog)
    parser.add_argument("level", type=_level, help="which")
    parser.add_argument("--max", action="store_true", help="no deeper than that; the policy decides what is below")
    add_for(parser)
    args = parser.parse_args(argv)
    return run_order("max" if args.max else "pin", args, prog, ("level", "for_s"))


def _level(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
