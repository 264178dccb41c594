"""`GET /morphserve/status` and the `morphserve:*` metrics on vLLM's own /metrics.

The engine core is asked twice a second; a scrape reads the last answer. vLLM's own cache_config_info label is
fixed at start and goes stale after a resize: `morphserve:kv_blocks` is the one to watch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from fastapi import APIRouter, HTTPException
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

logger = logging.getLogger("vllm.morphserve")

POLL_INTERVAL_S = 0.5
PREFIX = "morphserve:"


class StatusCollector(Collector):
    """Turns the last status into metric families."""

    def __init__(self) -> None:
        self.status: dict[str, Any] | None = None

    def collect(self) -> Iterator[Metric]:
        status = self.status
        if status is None:
            return
        yield from _gauges(status)
        yield from _counters(status)
        yield from _histograms(status)

    def describe(self) -> Iterator[Metric]:
        """Nothing is known before the first poll; without this the registry would call collect()."""
        return iter(())


def _gauge(name: str, doc: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, doc, value=value)


def _gauges(s: dict[str, Any]) -> Iterator[Metric]:
    yield _gauge("level", "Morph level that tokens count for; 0 = full precision.", s["exposure_level"])
    yield _gauge("target_level", "Level the transition in progress is heading for.", s["target_level"])
    blocks = GaugeMetricFamily(
        PREFIX + "kv_blocks", "KV blocks per rank, null block included.", labels=["state"]
    )
    blocks.add_metric(["published"], s["num_kv_blocks"])
    blocks.add_metric(["backed"], s["mapped_kv_blocks"])
    blocks.add_metric(["used"], s["used_kv_blocks"])
    yield blocks
    layers = GaugeMetricFamily(PREFIX + "layers", "Decoder layers by format.", labels=["format"])
    for fmt, count in s["layers_by_format"].items():
        layers.add_metric([fmt], count)
    yield layers
    memory = GaugeMetricFamily(PREFIX + "memory_bytes", "Ledger of one rank.", labels=["account"])
    for account, size in s["ledger"].items():
        memory.add_metric([account], size)
    yield memory
    if s["pause_ms"]["max"] is not None:
        yield _gauge("pause_ms_max", "Longest time a command kept a rank from its next step.",
                     s["pause_ms"]["max"])
    yield _gauge("failed", "1 when MorphServe gave up and the server goes on without it.", bool(s["failed"]))


def _histograms(s: dict[str, Any]) -> Iterator[Metric]:
    times = s["controller_time"]
    edges = [*(f"{edge:g}" for edge in times["edges_s"]), "+Inf"]
    yield HistogramMetricFamily(
        PREFIX + "controller_seconds",
        "Time of monitor, policy and controller in one engine step.",
        buckets=list(zip(edges, accumulate(times["counts"]), strict=True)),
        sum_value=times["sum_s"],
    )


def _counters(s: dict[str, Any]) -> Iterator[Metric]:
    transitions = CounterMetricFamily(
        PREFIX + "transitions", "Transitions by direction and outcome.", labels=["direction", "outcome"]
    )
    for key, count in s["transitions"].items():
        direction, _, outcome = key.partition("_")
        transitions.add_metric([direction, outcome], count)
    yield transitions
    tokens = CounterMetricFamily(PREFIX + "tokens", "Generated tokens by morph level.", labels=["level"])
    for level, count in s["tokens_by_level"].items():
        tokens.add_metric([level], count)
    yield tokens
    yield CounterMetricFamily(
        PREFIX + "transition_seconds", "Time spent in transitions.", value=s["transition_seconds"]
    )
    errors = CounterMetricFamily(PREFIX + "errors", "Errors by the part they came from.", labels=["where"])
    for where, count in s["errors"].items():
        errors.add_metric([where], count)
    yield errors


class MorphServeEndpoint:
    """Endpoint plugin (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "morphserve"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._collector = StatusCollector()
        self._client: Any = None
        self._task: asyncio.Task[None] | None = None

    def attach_router(self, app: Any) -> None:
        router = APIRouter(prefix="/morphserve")

        @router.get("/status")
        async def status() -> dict[str, Any]:
            """Level, capacity, ladder and counters of the engine, read between two of its steps."""
            answer = await self._ask()
            if answer is None:
                raise HTTPException(503, "the engine runs without MorphServe")
            return answer

        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        self._client = engine_client
        if engine_client is None:
            return
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            logger.warning(
                "morphserve: several API servers share one registry of files, which cannot hold morphserve:* "
                "metrics; GET /morphserve/status has the same figures. Use --api-server-count 1 for the metrics."
            )
        with contextlib.suppress(ValueError):  # a second app in this process: already registered
            REGISTRY.register(self._collector)
        self._task = asyncio.create_task(self._poll())

    async def _ask(self) -> dict[str, Any] | None:
        core = getattr(self._client, "engine_core", None)
        if core is None:
            return None
        return await core.call_utility_async("morphserve_status")

    async def _poll(self) -> None:
        warned = False
        while True:
            try:
                self._collector.status = await self._ask()
                warned = False
            except asyncio.CancelledError:
                raise
            except Exception as e:  # the engine may be starting, stopping or dead; the metrics go quiet
                self._collector.status = None
                if not warned:
                    logger.warning("morphserve: no status from the engine (%s)", e)
                warned = True
            await asyncio.sleep(POLL_INTERVAL_S)


def make_endpoint() -> MorphServeEndpoint:
    """Factory named by the `vllm.endpoint_plugins` entry point."""
    return MorphServeEndpoint()
