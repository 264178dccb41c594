"""What is often asked of us is answered ahead of vLLM's routes, where a question costs a third.

vLLM's instrumentation counts and times each request by the route that it looks up for it, then its router tries some
fifty routes, then FastAPI takes the request apart. All that is time of the thread that sends everybody's tokens, and
whoever reaches the port can ask as often as he likes. Middleware that `--middleware` names stands outside all this and
sees every request as before. vLLM leaves /version and /health out of its counts as well.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

_PATHS = ("/status", "/view", "/admin/state", "/reload")  # whose routes need the request and nothing else
_OF_SERVER_ERRORS = (500, Exception)  # keys of handlers that Starlette calls further out

Answer = Callable[[Request], Awaitable[Response]]


class Shortcut:
    """ASGI middleware that calls a route's own function where the path alone says which; all else goes the long way."""

    def __init__(self, app: ASGIApp, router: APIRouter, handlers: Mapping[Any, Any]) -> None:
        """Take the functions from `router`.

        Args:
            app: what is behind.
            router: has a route for each of the paths, by its own prefix.
            handlers: what the server answers for which exception.
        """
        routes = {route.path: route for route in router.routes if isinstance(route, APIRoute)}
        found = [routes[router.prefix + path] for path in _PATHS]
        self._app = app
        self._answers: dict[tuple[str, str], Answer] = {(m, r.path): r.endpoint for r in found for m in r.methods}
        known = {key: handler for key, handler in handlers.items() if key not in _OF_SERVER_ERRORS}
        self._answered = ExceptionMiddleware(self._answer, known)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_http = scope["type"] == "http"
        is_known = is_http and not scope["query_string"] and (scope["method"], scope["path"]) in self._answers
        await (self._answered if is_known else self._app)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._answers[scope["method"], scope["path"]](Request(scope, receive))
        await answer(scope, receive, send)
