"""What a running server is doing now: level and ladder, KV blocks, queue, late requests, quality spent, transitions.

Ends with 0 when the server has told its status, with 1 when there is none.

    morphserve status --url http://127.0.0.1:8000 --json | jq .level
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from morphserve.status_view import panels
from morphserve.tools.command import command_parser
from morphserve.tools.watch.client import NoStatus, add_server, fetch_status
from morphserve.tools.watch.text import as_text


def main(argv: Sequence[str] | None = None, prog: str = "morphserve status") -> int:
    """Print a server's status once."""
    parser = command_parser(__doc__, prog)
    add_server(parser)
    parser.add_argument("--json", action="store_true", help="print the document of GET /morphserve/status, on one line")
    args = parser.parse_args(argv)
    try:
        document = fetch_status(args.url, args.token_file)
    except NoStatus as e:
        sys.stderr.write(f"{prog}: {e}\n")
        return 1
    sys.stdout.write(json.dumps(document) + "\n" if args.json else as_text(panels(document)))
    return 0
