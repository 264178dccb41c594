"""Statuses as real servers told them, and a server that tells what a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# Recorded with `morphserve status --json` from a server of the demo model, kind slo, in an overload that it loses; but
# for the name of its settings' file.
RECORDED = Path(__file__).parent / "status_documents"


def recorded(name: str) -> dict[str, Any]:
    """`calm`, `moving` (between two levels), `burst`, or `restored`."""
    document = dict(json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8")))
    return {"orders": {"revision": 1, "order": None}, **document}  # recorded before there were any


def replicas() -> dict[str, Any]:
    """Two engines behind one server."""
    return {"engines": [recorded("calm"), {**recorded("burst"), "engine": 1}]}


@contextmanager
def answering(body: bytes, code: int = 200, heard: list[Any] | None = None, location: str = "") -> Iterator[str]:
    """The address of a server that gives this answer to everything; `heard` gets the headers of each question."""

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            if heard is not None:
                heard.append(self.headers)
            self.say(code, body, *([("Location", location)] if location else []))

    with serving(Handler) as url:
        yield url


class QuietHandler(BaseHTTPRequestHandler):
    """What both kinds of servers of tests have: an answer whole, and no line on stderr."""

    def say(self, code: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(code)
        for name, value in (("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        return None


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server that answers as `handler` does."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def nobody() -> str:
    """The address of a server that has just ended."""
    with answering(b"") as url:
        return url
