"""A running server as a terminal sees it: `morphserve status` once, `morphserve watch` until Ctrl-C."""

from __future__ import annotations

from morphserve.tools.watch.client import NoStatus, add_server, fetch_status_from_now, open_url, token_headers
from morphserve.tools.watch.status import main as status_main
from morphserve.tools.watch.watch import main as watch_main

__all__ = ["NoStatus", "add_server", "fetch_status_from_now", "open_url", "status_main", "token_headers", "watch_main"]
