"""Measure one running server with one workload."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp

from morphserve.tools.bench.load.client import ClientOptions, completion_body, new_session, replay, send
from morphserve.tools.bench.load.scrape import Poller, status_of
from morphserve.tools.bench.report.results import Observed
from morphserve.tools.options import option
from morphserve.tools.workload import Outcome, ReplayError, Slo, Workload

_ALIVE_S = 60.0  # a server that is only busy answers in that time
_DIED = "it died in the run, of which nothing is kept. Its log says why."
_LEAD_S = 0.5  # between the last preparation and workload time 0


@dataclass(frozen=True, slots=True)
class Measurement:
    """What to send, how, and how long to watch."""

    workload: Workload
    prompts: Sequence[list[int]]
    slo: Slo
    client: ClientOptions
    poll_s: float = option("beat of the /metrics poll", default=0.5, flag="--poll", metavar="S")
    restore_wait_s: float = 30.0  # after the last request, for level 0; 0 = do not wait


async def measure(what: Measurement, on_done: Callable[[Outcome], None] = lambda _: None) -> Observed:
    """Warm up, replay, watch until level 0, and collect.

    Args:
        on_done: called as each request ends.

    Raises:
        ReplayError: the warm-up request fails, or the server is gone at the end: nothing measured would mean anything.
    """
    zero = time.perf_counter()
    async with new_session(aiohttp.ClientTimeout(total=300)) as session:
        await _warm_up(session, what)
        poller = Poller(session, what.client.url, lambda: zero)
        zero = time.perf_counter() + _LEAD_S
        load_before = os.getloadavg()[0]
        await poller.once()
        polling = asyncio.create_task(poller.run(what.poll_s))
        try:
            replayed = await replay(what.workload, what.prompts, what.client, zero, on_done)
            await _await_level_zero(poller, what)
        finally:
            polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await polling
        await poller.once()
        await _check_alive(session, what.client.url)
        status = await status_of(what.client.url)
    setup = {
        "load_average_before": load_before,
        "load_average_after": os.getloadavg()[0],
        "polls_failed": poller.failures,
    }
    return Observed(replayed, poller.snapshots, status, setup)


async def _warm_up(session: aiohttp.ClientSession, what: Measurement) -> None:
    """Send one short request: first-use costs (compilation, allocation) are not the workload's."""
    prompt = what.prompts[0][:8]
    outcome = Outcome(index=0, scheduled_s=0.0, prompt_tokens=len(prompt), asked_tokens=8)
    await send(session, what.client, completion_body(what.client, prompt, 8), outcome, time.perf_counter())
    if not outcome.ok:
        raise ReplayError(
            f"{what.client.url} does not answer a request for model {what.client.model!r}: "
            f"{outcome.status} {outcome.error}. Check --url and --served-model-name."
        )


async def _check_alive(session: aiohttp.ClientSession, url: str) -> None:
    try:
        async with asyncio.timeout(_ALIVE_S), session.get(f"{url}/health") as answer:
            is_dead = answer.status == 503  # vLLM's API process outlives its engine by seconds
    except (aiohttp.ClientError, OSError, TimeoutError) as e:
        raise ReplayError(f"{url} does not answer any more ({type(e).__name__}): {_DIED}") from e
    if is_dead:
        raise ReplayError(f"{url}/health answers that the engine is dead: {_DIED}")


async def _await_level_zero(poller: Poller, what: Measurement) -> None:
    deadline = time.perf_counter() + what.restore_wait_s
    while time.perf_counter() < deadline:
        if poller.snapshots and not poller.snapshots[-1].level:
            return
        await asyncio.sleep(what.poll_s)
