"""Bring scenarios and servers together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from morphserve.tools.bench import ClientOptions, Poller, Server, ServerOptions, serve, status_of
from morphserve.tools.chaos import processes
from morphserve.tools.chaos.faults import Stage
from morphserve.tools.chaos.judge import RESTORED_WITHIN_S, Seen
from morphserve.tools.chaos.libraries import failing_library
from morphserve.tools.chaos.load import CANARY_TOKENS, NUM_CANARIES, Traffic, Wave, ask_canary, canary_prompts, until
from morphserve.tools.chaos.scenarios import Scenario

_POLL_S = 0.1
_END_S = 60.0  # of a server: its engine gone, its clients told
# The load must move the level often: a fault in the middle of a transition is what is asked about.
COMMON: Mapping[str, Any] = {
    "version": 1,
    "policy": {
        "kind": "threshold",
        "degrade_above": 0.6,
        "target_usage": 0.5,
        "restore_below": 0.4,
        "restore_after_s": 0.5,
    },
    "transition": {"max_layers_per_step": 2, "rank_timeout_s": 30.0, "backoff_s": 1.0},
}


@dataclass(frozen=True, slots=True)
class ChaosServer(ServerOptions):
    """A server for one scenario, or for several that leave it as it was."""

    more_environment: tuple[tuple[str, str], ...] = field(default=())

    def environment(self) -> dict[str, str]:
        """Return the environment; resetting the cache is among vLLM's routes for developers."""
        # Not `super()`: a dataclass with slots is made a second time, and this would look for the first.
        return ServerOptions.environment(self) | {"VLLM_SERVER_DEV_MODE": "1", **dict(self.more_environment)}


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs scenarios. `settings` of the YAML go over the common ones, a scenario's over both."""

    server: ChaosServer
    directory: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_swings: int = 2  # of the wave, in each scenario

    async def reference(self) -> dict[int, tuple[int, ...]]:
        """Ask a stock server, alone and under load, and return the canaries that it always answers alike."""
        with serve(self.server, self.directory / "stock.log") as server:
            async with _client() as session:
                options = self._options(server)
                alone = [await ask_canary(session, options, i) for i in range(len(canary_prompts()))]
                traffic = Traffic()
                async with Wave(session, options, traffic, seed=1).running() as wave:
                    await wave.swing(1)
        answers = [*alone, *traffic.canaries]
        kept = {each.prompt: each.tokens for each in alone if len(each.tokens) == CANARY_TOKENS}
        return {i: t for i, t in kept.items() if {each.tokens for each in answers if each.prompt == i} == {t}}

    async def run(self, scenarios: Sequence[Scenario]) -> AsyncIterator[tuple[Scenario, Seen]]:
        """Run scenarios, one after the other on one server where they leave it as it was."""
        together = [each for each in scenarios if not each.alone]
        groups = [together] if together else []
        for group in [*groups, *([each] for each in scenarios if each.alone)]:
            async for result in self._on_one_server(group):
                yield result

    async def _on_one_server(self, group: Sequence[Scenario]) -> AsyncIterator[tuple[Scenario, Seen]]:
        first = group[0]
        directory = self.directory / first.name
        directory.mkdir(parents=True, exist_ok=True)
        log, config = directory / "server.log", directory / "morph.yaml"
        config.write_text(yaml.safe_dump(self._settings(first, directory)), encoding="utf-8")
        own_args = ("--plugin", "morphserve", "--morphserve-config", str(config))
        seen: list[Seen] = []
        with serve(self._prepared(first, directory), log, own_args) as server:
            cache = Path(str(self._settings(first, directory).get("cache_dir", directory)))
            for scenario in group:
                said = len(log.read_text(encoding="utf-8", errors="replace"))
                seen.append(await self._stage(scenario, server, config, cache))
                is_last = scenario is group[-1]
                if is_last:
                    await _end(seen[-1], server, asked=not scenario.ends)
                else:
                    seen[-1].exit_ended = True  # that is for the last one to show
                seen[-1].log = log.read_text(encoding="utf-8", errors="replace")[said:]
        for scenario, each in zip(group, seen, strict=True):
            yield scenario, each

    async def _stage(self, scenario: Scenario, server: Server, config: Path, cache: Path) -> Seen:
        traffic = Traffic()
        seen = Seen(traffic)
        async with _client() as session:
            poller = Poller(session, server.url, lambda: traffic.zero)
            seen.snapshots = poller.snapshots
            polling = asyncio.create_task(poller.run(_POLL_S))

            def levels() -> tuple[int, int]:
                last = poller.snapshots[-1] if poller.snapshots else None
                return (0, 0) if last is None else (last.level or 0, sum(last.transitions.values()))

            stage = Stage(
                session, self._options(server), int(server.pid or 0), config, cache, levels, traffic,
                config.parent / "fail",
            )  # fmt: skip
            async with Wave(session, stage.options, traffic, seed=len(scenario.name)).running() as wave:
                swinging = asyncio.create_task(wave.swing(self.num_swings))
                seen.fault_s = time.perf_counter() - traffic.zero
                try:
                    await scenario.fault(stage)
                except (AssertionError, OSError, ValueError) as e:
                    seen.fault_error = f"{type(e).__name__}: {e}"
                if scenario.ends:
                    swinging.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await swinging
            if not scenario.ends:
                await _rest(seen, session, stage)
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
        return seen

    def _settings(self, scenario: Scenario, directory: Path) -> dict[str, Any]:
        own = {key: str(value).format(directory=directory) for key, value in scenario.settings.items()}
        return {**COMMON, **self.settings, **own}

    def _prepared(self, scenario: Scenario, directory: Path) -> ServerOptions:
        if not scenario.fails_in_libc:
            return self.server
        library = failing_library(directory)
        more = (("LD_PRELOAD", str(library)), ("MORPHSERVE_CHAOS_FAIL", str(directory / "fail")))
        return replace(self.server, more_environment=more)

    def _options(self, server: Server) -> ClientOptions:
        return ClientOptions(url=server.url, model=self.server.served_model_name, request_timeout_s=90.0)


async def _rest(seen: Seen, session: aiohttp.ClientSession, stage: Stage) -> None:
    """Wait for level 0, and ask the canaries once more there."""
    begin = time.perf_counter()
    if await until(lambda: stage.levels()[0] == 0, RESTORED_WITHIN_S):
        seen.restored_s = time.perf_counter() - begin
        for i in range(NUM_CANARIES):
            stage.traffic.canaries.append(await ask_canary(session, stage.options, i))
        await asyncio.sleep(1.0)
    seen.status = await status_of(stage.options.url)


async def _end(seen: Seen, server: Server, asked: bool) -> None:
    """Wait for the server's end, after a SIGTERM where it is asked to; look for what outlives it."""
    pid = int(server.pid or 0)
    if asked:
        os.kill(pid, signal.SIGTERM)
    seen.exit_ended = await until(lambda: processes.has_ended(pid), _END_S)
    if seen.exit_ended:
        await until(lambda: not processes.command_lines(pid), 5.0)
    seen.left_over = list(processes.command_lines(pid).values())


@contextlib.asynccontextmanager
async def _client() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield session
