"""Two servers side by side, measured in turn: what does the plugin cost while nothing morphs?"""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from morphserve.tools.bench.load.client import new_session
from morphserve.tools.bench.load.server import ServerOptions, serve
from morphserve.tools.watch import NoStatus, fetch_status_from_now
from morphserve.tools.workload import ReplayError

# Student's t, 97.5 % quantile, by degrees of freedom (pairs - 1); beyond the table an expansion around the normal's.
_T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
_Z975 = 1.959964


def _t975(freedom: int) -> float:
    """Return Student's quantile; beyond the table by Cornish and Fisher's expansion, right to three digits there."""
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z = _Z975
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def half_width(ratios: Sequence[float]) -> float:
    """Return half the width of the 95 % confidence interval of the mean of two or more ratios (paired t)."""
    return _t975(len(ratios) - 1) * statistics.stdev(ratios) / math.sqrt(len(ratios))


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """A fixed number of clients, each sending its next request when the one before is answered."""

    prompts: Sequence[list[int]]  # one a request; they begin again where there are too few
    concurrency: int = 16
    requests: int = 48
    output_tokens: int = 96


@dataclass(frozen=True, slots=True)
class PairedResult:
    """Output tokens per second of both servers, pair by pair, and what that says of their ratio."""

    stock_tok_s: tuple[float, ...]
    plugin_tok_s: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Plugin over stock, by pair."""
        return tuple(p / s for p, s in zip(self.plugin_tok_s, self.stock_tok_s, strict=True))

    @property
    def mean(self) -> float:
        return statistics.fmean(self.ratios)

    @property
    def lower(self) -> float:
        """Lower 97.5 % confidence bound of the mean ratio (paired t)."""
        return self.mean - half_width(self.ratios)

    def as_json(self) -> dict[str, Any]:
        return {
            "pairs": len(self.ratios),
            "stock_tok_s": [round(v, 1) for v in self.stock_tok_s],
            "plugin_tok_s": [round(v, 1) for v in self.plugin_tok_s],
            "ratios": [round(v, 4) for v in self.ratios],
            "ratio_mean": round(self.mean, 4),
            "ratio_lower_97_5": round(self.lower, 4),
        }


def compare_idle(
    servers: Mapping[str, ServerOptions], out: Path, loop: ClosedLoop, pairs: int, on_pair: Callable[[int, float], None]
) -> tuple[PairedResult, dict[str, Any]]:
    """Start both, measure them alternately, stop both.

    Both are up all the time and share their cores, but only one has work: what differs between the two
    runs of a pair is the server alone, not the minute in which it was measured. Each pair swaps the order.

    Args:
        servers: "stock" and "plugin".
        out: directory of their logs.
        on_pair: called with each pair's number, from 0, and its ratio.

    Returns:
        The throughputs, and the plugin server's /morphserve/status at the end.

    Raises:
        ReplayError: a server does not start, an answer fails, or the plugin left level 0.
    """
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        urls = {n: stack.enter_context(serve(options, out / f"{n}.log")).url for n, options in servers.items()}
        for name, url in urls.items():  # warm-up: kernels, allocator, connections
            asyncio.run(_closed_loop(url, servers[name].served_model_name, loop))
        found: dict[str, list[float]] = {name: [] for name in urls}
        for pair in range(pairs):
            for name in ("stock", "plugin") if pair % 2 == 0 else ("plugin", "stock"):
                seconds = asyncio.run(_closed_loop(urls[name], servers[name].served_model_name, loop))
                found[name].append(loop.requests * loop.output_tokens / seconds)
            on_pair(pair, found["plugin"][-1] / found["stock"][-1])
        try:
            status = fetch_status_from_now(urls["plugin"])
        except NoStatus as e:
            raise ReplayError(str(e)) from e
    if degraded := sum(n for level, n in status["tokens_by_level"].items() if level != "0"):
        raise ReplayError(f"{degraded} tokens were served above level 0: this is no idle run. Raise --num-blocks.")
    return PairedResult(tuple(found["stock"]), tuple(found["plugin"])), status


async def _closed_loop(url: str, model: str, loop: ClosedLoop) -> float:
    """Return the seconds from the first request to the last answer."""
    left = iter(range(loop.requests))
    async with new_session(aiohttp.ClientTimeout(total=600)) as session:

        async def client() -> None:
            for index in left:
                body = {
                    "model": model,
                    "prompt": loop.prompts[index % len(loop.prompts)],
                    "max_tokens": loop.output_tokens,
                    "temperature": 0.0,
                    "ignore_eos": True,
                }
                async with session.post(f"{url}/v1/completions", json=body) as answer:
                    if answer.status != 200:
                        raise ReplayError(f"{url}: HTTP {answer.status}: {(await answer.text())[:200]}")
                    await answer.read()

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(loop.concurrency)))
        return time.perf_counter() - start
