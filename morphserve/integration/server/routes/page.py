"""`GET /morphserve`: a page that shows what `morphserve watch` shows, live, and `GET /morphserve/view`, which it asks.

Both only read. The page is one file that loads nothing; its headers forbid all but its own script and style. It holds
no figure, so anybody may load it; the view is for those who may see the status. The page asks for a token where one
must be shown, keeps it in its own memory alone, and sends it with every question.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from morphserve.integration.server.routes.access import Access
from morphserve.integration.server.routes.status_api import LastStatuses, shown
from morphserve.status_view import panels

PAGE = Path(__file__).with_name("page.html")


def add_page(router: APIRouter, last: LastStatuses, access: Callable[[], Access]) -> None:
    """Add the page at the router's own path, with and without a slash, and its source."""
    html = PAGE.read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": policy_of(html), "X-Content-Type-Options": "nosniff"}

    @router.get("", include_in_schema=False)
    @router.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """Return the page: the same for every server and state."""
        return HTMLResponse(html, headers={**headers, "Cache-Control": "no-cache"})

    @router.get("/view")
    async def view(request: Request) -> Response:
        """Return the last poll's status of all engines in words, as the page and `morphserve watch` show it."""
        is_trusted = access().check_read(request)
        found = last.of(None)

        def words(age_s: float) -> dict[str, Any]:
            engines = [shown(status, is_trusted) for status in found]
            return {"panels": [asdict(panel) for panel in panels({"age_s": age_s, "engines": engines})]}

        return last.document(("view", is_trusted), words)


def policy_of(html: str) -> str:
    """Return the page's Content-Security-Policy: nothing but the script and style that stand in it."""
    script, style = (_digest(html, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    )


def _digest(html: str, tag: str) -> str:
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
