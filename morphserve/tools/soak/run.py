"""Two servers beside each other, with the same bursts by turns, and a sample a minute at rest."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from morphserve.errors import MorphServeError
from morphserve.tools.bench import ClientOptions, Server, ServerOptions, serve, status_of
from morphserve.tools.chaos import command_lines, has_ended
from morphserve.tools.command import say
from morphserve.tools.soak.load import Client, draw_burst
from morphserve.tools.soak.recall import MAX_LENGTH, make_model
from morphserve.tools.soak.sample import usage_of

OURS, STOCK = "morphserve", "stock"
SAMPLES = "samples.jsonl"
_EVERY_S = 60.0
_QUIET_S = 3.0  # before a sample: connections of the last burst are closed
_PATIENCE_S = 60.0  # for level 0
_LEAST_PAUSE_S = 0.5
_KEEP_ALIVE_S = 1.0
POLICIES: Mapping[str, Mapping[str, Any]] = {  # that a burst takes down and its end back, each as often as it may
    "threshold": {
        "mode": "performance", "degrade_above": 0.6, "target_usage": 0.5, "restore_below": 0.5, "restore_after_s": 0.1,
    },
    "slo": {"ttft_s": 0.2, "tpot_s": 0.1},
}  # fmt: skip
_SETTINGS: Mapping[str, Any] = {
    "version": 1,
    "transition": {"max_layers_per_step": 1},
    "ladder": {
        "order": "front_to_back",
        "steps": [{"format": fmt, "layers_per_level": 1, "optional": True} for fmt in ("w8", "w4")],
    },
    "prepared": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SoakServer(ServerOptions):
    """A server of the model of known answers."""

    # oneDNN keeps 1,024 compiled kernels, one for each shape of a batch: they would add up for hours, with stock, too.
    kept_kernels: int = field(default=16)

    def environment(self) -> dict[str, str]:
        """Return the environment: few compiled kernels are kept, so that what else grows is seen."""
        own = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(self.kept_kernels), "OMP_NUM_THREADS": "1"}
        return ServerOptions.environment(self) | own


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, where, and how much of a core."""

    directory: Path
    minutes: float
    share: float = 0.4  # of the time in which requests are under way, to either server
    kind: str = "threshold"  # of the policy
    seed: int = 0


def options(model: Path) -> SoakServer:
    """Return how both servers are started: on the first core that this process may use."""
    core = min(os.sched_getaffinity(0))
    return SoakServer(
        model=str(model), enforce_eager=True, cpu_bind=str(core), num_blocks=64, max_model_len=MAX_LENGTH // 2,
        max_num_seqs=24, prefix_caching=True,
    )  # fmt: skip


def settings(plan: Plan) -> dict[str, Any]:
    """Return the settings of the server with the plugin."""
    policy = {"kind": plan.kind, **POLICIES[plan.kind]}
    return {**_SETTINGS, "policy": policy, "cache_dir": str(plan.directory / "cache")}


async def run(plan: Plan) -> None:
    """Run it, and leave a row a minute in the directory."""
    server = options(make_model(plan.directory / "model"))
    config = plan.directory / "morph.yaml"
    config.write_text(yaml.safe_dump(settings(plan)), encoding="utf-8")
    ours = ("--plugin", "morphserve", "--morphserve-config", str(config))
    with (
        serve(server, plan.directory / "stock.log") as stock,
        serve(server, plan.directory / "morphserve.log", ours) as morphing,
        (plan.directory / SAMPLES).open("w", encoding="utf-8") as rows,
    ):
        async with _clients(server, {OURS: morphing, STOCK: stock}) as sides:
            await _Soak(plan, sides, rows).run()
        pids = [int(each.pid or 0) for each in (morphing, stock)]
    left = [line for pid in pids for line in command_lines(pid).values()]
    with (plan.directory / SAMPLES).open("a", encoding="utf-8") as rows:
        rows.write(json.dumps({"end": True, "left_over": left}) + "\n")


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two servers, and who asks it."""

    server: Server
    client: Client


@contextlib.asynccontextmanager
async def _clients(options: ServerOptions, servers: Mapping[str, Server]) -> Any:
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield {
            name: Side(server, Client(session, ClientOptions(server.url, options.served_model_name)))
            for name, server in servers.items()
        }


class _Soak:
    def __init__(self, plan: Plan, sides: Mapping[str, Side], rows: Any) -> None:
        self._plan = plan
        self._sides = sides
        self._rows = rows
        self._draw = random.Random(plan.seed)
        self._begin = time.monotonic()

    @property
    def _now_s(self) -> float:
        return time.monotonic() - self._begin

    async def run(self) -> None:
        """Send bursts until the time is over; a sample at the beginning, every minute, and at the end."""
        next_s = 0.0
        while self._now_s < 60 * self._plan.minutes:
            if gone := [name for name, side in self._sides.items() if has_ended(int(side.server.pid or 0))]:
                raise MorphServeError(f"the server {gone[0]} ended after {self._now_s / 60:.0f} min")
            begin = time.monotonic()
            asks = draw_burst(self._draw)
            for side in self._sides.values():  # by turns: one core serves both
                await side.client.burst(asks)
            took_s = time.monotonic() - begin
            await asyncio.sleep(max(_LEAST_PAUSE_S, took_s * (1 / self._plan.share - 1)))
            if self._now_s >= next_s:
                next_s = self._now_s + _EVERY_S
                await self._sample()
        await self._sample()

    async def _sample(self) -> None:
        """Wait for rest, and write what the servers take."""
        await asyncio.sleep(_QUIET_S)
        status = await self._rested()
        at_s = self._now_s
        taken: dict[str, float] = {}
        for name, side in self._sides.items():
            usages = usage_of(int(side.server.pid or 0))
            taken[name] = sum(usage.rss_kib for usage in usages) / 1024
            row = {
                "t_s": round(at_s, 1),
                "at": round(time.time()),
                "side": name,
                "processes": [usage.as_json() for usage in usages],
                **side.client.books.as_json(),
            }
            if name == OURS:
                row["status"] = status and {key: status.get(key) for key in _KEPT}
            self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        say(_line(at_s, status, self._sides, taken))

    async def _rested(self) -> dict[str, Any] | None:
        """Return the status at level 0, or what it is after a while."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            status = await status_of(self._sides[OURS].server.url)
            at_rest = status is not None and status["level"] == 0 and status["phase"] == "idle"
            if at_rest or time.monotonic() > deadline:
                return status
            await asyncio.sleep(0.2)


_KEPT = (
    "level", "num_kv_blocks", "mapped_kv_blocks", "num_running", "num_waiting", "transitions", "transition_seconds",
    "errors", "failed", "controller_time", "tokens_by_level", "pause_ms", "counters",
)  # fmt: skip


def _line(at_s: float, status: Mapping[str, Any] | None, sides: Mapping[str, Side], mib: Mapping[str, float]) -> str:
    books = [side.client.books for side in sides.values()]
    moved = sum((status or {}).get("transitions", {}).values())
    answers = "  ".join(str(each.answered) for each in books)
    faults = f"{sum(each.lost for each in books)}  {sum(each.wrong for each in books)}"
    return f"{at_s / 60:.0f}  {moved}  {answers}  {faults}  {'  '.join(f'{taken:.1f}' for taken in mib.values())}"


def read_rows(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that a run has left, also of one that is under way."""
    with (directory / SAMPLES).open(encoding="utf-8") as rows:
        for line in rows:
            if line.endswith("\n"):
                yield json.loads(line)
