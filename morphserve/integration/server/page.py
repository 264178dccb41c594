"""`GET /morphserve`: a page that shows what `morphserve watch` shows, live, and `GET /morphserve/view`, which it asks.

Both only read. The page is one file that loads nothing; its headers forbid all but its own script and style.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import HTMLResponse

from morphserve.status_view import panels

Ask = Callable[[], Awaitable[list[dict[str, Any]]]]

PAGE = Path(__file__).with_name("page.html")


def add_page(router: APIRouter, ask: Ask) -> None:
    """Add the page at the router's own path, with and without a slash, and its source."""
    html = PAGE.read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": policy_of(html), "X-Content-Type-Options": "nosniff"}

    @router.get("", include_in_schema=False)
    @router.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """Return the page: the same for every server and state."""
        return HTMLResponse(html, headers={**headers, "Cache-Control": "no-cache"})

    @router.get("/view")
    async def view() -> dict[str, Any]:
        """Return the status of all engines in words, as the page and `morphserve watch` show it."""
        answers = await ask()
        if not answers:
            raise HTTPException(503, "the engine runs without MorphServe")
        return {"panels": [asdict(panel) for panel in panels({"engines": answers})]}


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
