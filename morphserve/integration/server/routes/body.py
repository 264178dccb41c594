"""The body of a request that changes something: so long, within so many seconds, one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import HTTPException, Request

_TIMEOUT_S = 10.0  # of whoever sends it a byte at a time


@asynccontextmanager
async def alone(lock: asyncio.Lock, what: str) -> AsyncIterator[None]:
    """Let one in at a time, and refuse the others before a byte of their bodies is read.

    Raises:
        HTTPException: somebody is in.
    """
    if lock.locked():
        raise busy(what)
    async with lock:
        yield


async def text_of(request: Request, max_bytes: int) -> str:
    """Return the body of a request.

    Raises:
        HTTPException: too long, too slow, or no text.
    """
    body = b""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise HTTPException(413, f"the body has more than {max_bytes:,} bytes. Send what is asked for")
    except TimeoutError as e:
        raise HTTPException(408, f"the body has not come within {_TIMEOUT_S:.0f} s") from e
    try:
        return body.decode()
    except UnicodeDecodeError as e:
        raise HTTPException(422, f"the body is not UTF-8 text ({e.reason} at byte {e.start})") from e


@asynccontextmanager
async def answered_within(limit_s: float) -> AsyncIterator[None]:
    """Wait for engines so long.

    Raises:
        TimeoutError: one has not answered; it says for how long.
    """
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError as e:
        raise TimeoutError(f"an engine has not answered for {limit_s:g} s") from e


def busy(what: str) -> HTTPException:
    """Return the refusal of a second one while the first is under way."""
    return HTTPException(429, f"another {what} is under way. Ask again when it has answered", {"Retry-After": "1"})
