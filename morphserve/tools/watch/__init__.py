"""A running server as a terminal sees it: `morphserve status` once, `morphserve watch` until Ctrl-C."""

from __future__ import annotations

from morphserve.tools.watch.status import main as status_main
from morphserve.tools.watch.watch import main as watch_main

__all__ = ["status_main", "watch_main"]
