"""How `morphserve:*` gets onto vLLM's own /metrics, of one API server or several."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal, get_args

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_PATH = "/metrics"
PREFIX = "morphserve:"
Refusal = Literal["shed", "drain", "floor"]


class Refusals(Collector):
    """The requests that this API server has answered with 503 for us, by reason: a policy's queue limit, an order to
    drain, a level that may not be held any more.

    No engine hears of them. vLLM's page of several API servers sums up what each of them has counted.
    """

    def __init__(self) -> None:
        """Begin at 0, for each reason."""
        doc = "Requests answered with 503: by a policy's queue limit, a drain, or a level that may not be held."
        self.counter = Counter(PREFIX + "requests_refused", doc, ["reason"], registry=None)
        for reason in get_args(Refusal):
            self.counter.labels(reason)

    def collect(self) -> Iterable[Metric]:
        """Return the counts."""
        return self.counter.collect()

    def describe(self) -> Iterable[Metric]:
        """Return nothing: a process that has a second API server after the first registers its counts, too."""
        return ()

    def count(self, reason: Refusal) -> None:
        """Count one."""
        self.counter.labels(reason).inc()


def _is_shared() -> bool:
    """Return whether /metrics is what several API servers have written into files: no collector is in those."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


def add_to_own(collector: Collector) -> None:
    """Add to the /metrics of a lone API server what `collector` has; of several none reads its registry."""
    REGISTRY.register(collector)


def add_behind_shared(app: FastAPI, collector: Collector) -> None:
    """Answer /metrics of one of several API servers with vLLM's page, and what `collector` has behind it.

    Ours asks all engines in each of them, so any of them may answer a scrape. The route of an endpoint plugin takes
    the place of vLLM's own (vllm/plugins/endpoint_plugins/interface.py).
    """
    routes = [route for route in app.routes if isinstance(route, APIRoute) and route.path == _PATH]
    if not routes or not _is_shared():
        return
    ours = CollectorRegistry()
    ours.register(collector)

    @app.get(_PATH, include_in_schema=False)
    def metrics(request: Request) -> Response:
        """Return both."""
        theirs: Response = routes[-1].endpoint(request)
        said_as = {"Content-Type": theirs.headers["Content-Type"]}
        return Response(bytes(theirs.body) + generate_latest(ours), headers=said_as)
