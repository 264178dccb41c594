"""What a server gets in live_tasks.py: lm-eval's requests through a relay, and a load beside them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from live_items import Levels

from morphserve.errors import MorphServeError
from morphserve.tools.bench.load.client import ClientOptions, replay
from morphserve.tools.bench.load.measure import Measurement
from morphserve.tools.workload import CUTOFF


class Relay:
    """What lm-eval asks instead of the server, so that it is known at which level its prompts were computed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.levels: Levels = {}  # nothing of a stock server

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Yield the address of the API."""
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/v1/completions", self._pass_on)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as self._session:
                await (site := web.TCPSite(runner, "127.0.0.1", 0)).start()
                yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1/completions"
                await site.stop()
        finally:
            await runner.cleanup()

    async def _pass_on(self, request: web.Request) -> web.Response:
        body = body_for_server(await request.json())
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as answer:
                if receipt := answer.headers.get("X-MorphServe-Receipt"):
                    (prompt,) = body["prompt"]
                    self.levels[tuple(prompt)] = json.loads(receipt)["computed_tokens"]
                return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)
        except aiohttp.ClientError as e:
            return web.Response(text=str(e), status=502)


def body_for_server(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return lm-eval's request without its seed, which a runner of vLLM's may not bear, asking for a receipt."""
    return {k: v for k, v in body.items() if k != "seed"} | {"vllm_xargs": {"morphserve_receipt": 1}}


async def keep_loaded(what: Measurement, client: ClientOptions, rest_s: float | None, ended: Counter[str]) -> None:
    """Replay the trace over and over until cancelled, whatever became of the time before; count how requests end."""

    async def once() -> None:
        begin = time.perf_counter()
        replayed = await replay(what.workload, what.prompts, client, begin, lambda o: ended.update([o.status]))
        ended.update(o.status for o in replayed.outcomes if o.status == CUTOFF)  # of these nobody tells as they end

    rounds: list[asyncio.Task[None]] = []
    try:
        while rest_s is not None:
            for each in rounds:
                if each.done():
                    each.result()
            rounds = [each for each in rounds if not each.done()] + [asyncio.create_task(once())]
            await asyncio.sleep(what.workload.span_s + rest_s)
    finally:
        for each in rounds:
            each.cancel()
        await asyncio.gather(*rounds, return_exceptions=True)


async def run_lm_eval(words: Sequence[str], work: Path, timeout_s: float) -> None:
    """Run lm-eval, without any hub and with its cache in `work`; nothing of it is left when this returns.

    Raises:
        MorphServeError: it fails, or is not done in time.
    """
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache")}
    log = work / "lm_eval.log"
    with log.open("wb") as stream:
        process = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
            env=os.environ | own | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            async with asyncio.timeout(timeout_s):
                code = await process.wait()
        except TimeoutError as e:
            why = f"--task-timeout {timeout_s:g} s are over: raise it, ask fewer items or send less load (--thin)"
            raise MorphServeError(f"{why}. Log: {log}") from e
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if code:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
        raise MorphServeError(f"lm-eval ended with {code} and said last: {said[-1][:300]}. Log: {log}")
