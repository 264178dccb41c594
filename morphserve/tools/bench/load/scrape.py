"""What the server says of itself: a time series of /metrics, and MorphServe's status page."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from morphserve.tools.watch import NoStatus, fetch_status_from_now, open_url
from morphserve.tools.workload import ReplayError, Snapshot

_METRICS_S = 10.0  # a page is written in milliseconds


def snapshot(text: str, t_s: float) -> Snapshot:
    """Fold one page of /metrics into a snapshot; several engines of one server are added up."""
    page = _Page(text)
    usage = page.fold("vllm:kv_cache_usage_perc", statistics.fmean)
    published = page.by("morphserve:kv_blocks", "state")
    if not published and (stock := page.label("vllm:cache_config_info", "num_gpu_blocks")) is not None:
        published = {"published": stock, "backed": stock}
        if usage is not None:
            published["used"] = round(usage * (stock - 1))
    return Snapshot(
        t_s=t_s,
        kv_usage=usage,
        running=page.whole("vllm:num_requests_running", sum),
        waiting=page.whole("vllm:num_requests_waiting", sum),
        preemptions=page.whole("vllm:num_preemptions_total", sum),
        level=page.whole("morphserve:level", max),
        blocks_published=published.get("published"),
        blocks_backed=published.get("backed"),
        blocks_used=published.get("used"),
        layers=page.by("morphserve:layers", "format"),
        tokens_by_level=page.by("morphserve:tokens_total", "level"),
        transitions=page.by("morphserve:transitions_total", "direction", "outcome"),
        transition_s=page.fold("morphserve:transition_seconds_total", sum),
        errors=page.by("morphserve:errors_total", "where"),
        pause_max_ms=page.fold("morphserve:pause_ms_max", max),
    )


def num_kv_blocks(url: str) -> int:
    """Return how many KV blocks the server at `url` says that it has.

    Raises:
        ReplayError: it does not say.
    """
    try:
        with open_url(f"{url}/metrics", _METRICS_S) as response:
            found = snapshot(response.read().decode("utf-8", errors="replace"), 0.0).blocks_published
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise ReplayError(f"{url}/metrics: {e}. Say with --num-blocks how many KV blocks the server has.") from e
    if not found:
        raise ReplayError(f"{url}/metrics names no KV blocks. Say with --num-blocks how many the server has.")
    return int(found)


class _Page:
    """Figures of one metrics page; every answer is None or empty where a metric is absent.

    Only the lines asked for are parsed, one by one: the client sends nothing while it parses all the others, and the
    parser gives up a page at its first damaged line.
    """

    def __init__(self, text: str) -> None:
        self._lines: dict[str, list[str]] = {}
        for line in text.splitlines():
            self._lines.setdefault(line.partition("{")[0].partition(" ")[0], []).append(line)

    def _samples(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        for line in self._lines.get(name, ()):
            with contextlib.suppress(ValueError, IndexError, OverflowError):  # what the parser makes of damaged lines
                (family,) = text_string_to_metric_families(line)
                (sample,) = family.samples
                if math.isfinite(sample.value):  # a gauge that was never set reads NaN
                    yield sample.labels, float(sample.value)

    def fold(self, name: str, how: Callable[[list[float]], float]) -> float | None:
        values = [value for _, value in self._samples(name)]
        return how(values) if values else None

    def whole(self, name: str, how: Callable[[list[float]], float]) -> int | None:
        value = self.fold(name, how)
        return None if value is None else round(value)

    def by(self, name: str, *labels: str) -> dict[str, int]:
        out: dict[str, int] = {}
        for have, value in self._samples(name):
            key = "/".join(have.get(label, "") for label in labels)
            out[key] = out.get(key, 0) + round(value)
        return out

    def label(self, name: str, label: str) -> int | None:
        values = [have.get(label, "") for have, _ in self._samples(name)]
        return sum(int(v) for v in values) if values and all(v.isdecimal() for v in values) else None


class Poller:
    """Asks /metrics at a steady beat until told to stop; a page that fails to come is left out."""

    def __init__(self, session: aiohttp.ClientSession, url: str, zero: Callable[[], float]) -> None:
        """Ask nothing yet. `zero` gives the perf_counter reading that counts as 0 s."""
        self._session = session
        self._url = url
        self._zero = zero
        self.snapshots: list[Snapshot] = []
        self.failures = 0

    async def once(self) -> Snapshot | None:
        """Take one snapshot."""
        try:
            async with asyncio.timeout(10), self._session.get(f"{self._url}/metrics") as response:
                response.raise_for_status()
                text = await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            self.failures += 1
            return None
        taken = snapshot(text, time.perf_counter() - self._zero())
        self.snapshots.append(taken)
        return taken

    async def run(self, every_s: float) -> None:
        """Poll until cancelled."""
        while True:
            begin = time.perf_counter()
            await self.once()
            await asyncio.sleep(max(0.05, every_s - (time.perf_counter() - begin)))


async def status_of(url: str) -> dict[str, Any] | None:
    """Return MorphServe's /morphserve/status as it is from now on, or None where there is none."""
    try:
        return await asyncio.to_thread(fetch_status_from_now, url)
    except NoStatus:
        return None
