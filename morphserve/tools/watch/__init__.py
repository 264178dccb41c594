"""A running server as a terminal sees it: `morphserve status` once, `morphserve watch` until Ctrl-C."""

from __future__ import annotations

from morphserve.tools.watch.client import NoStatus, fetch_status
from morphserve.tools.watch.status import main as status_main
from morphserve.tools.watch.watch import main as watch_main

__all__ = ["NoStatus", "fetch_status", "status_main", "watch_main"]
