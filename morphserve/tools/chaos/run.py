"""Bring scenarios and servers together."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from morphserve.tools.bench import ClientOptions, Poller, Server, ServerOptions, serve
from morphserve.tools.chaos import processes
from morphserve.tools.chaos.judge import RESTORED_WITHIN_S, Seen
from morphserve.tools.chaos.libraries import CACHE, SAYS, failing_library
from morphserve.tools.chaos.load import (
    CANARY_TOKENS,
    REQUEST_TIMEOUT_S,
    CanaryAnswer,
    Traffic,
    Wave,
    ask_canary,
    canary_prompts,
    until,
)
from morphserve.tools.chaos.scenarios import SCENARIOS, Scenario, by_server
from morphserve.tools.chaos.stage import Stage
from morphserve.tools.workload import ReplayError

_POLL_S, _STATUS_S = 0.1, 0.5
_END_S = 60.0  # of a server: its engine gone, its clients told
# The load must move the level often: a fault in the middle of a transition is what is asked about.
POLICIES: Mapping[str, Mapping[str, Any]] = {
    "threshold": {"degrade_above": 0.6, "target_usage": 0.5, "restore_below": 0.4, "restore_after_s": 0.5},
    "slo": {"ttft_s": 1.0, "tpot_s": 0.5},
}
COMMON: Mapping[str, Any] = {
    "version": 1,
    "transition": {"max_layers_per_step": 2, "rank_timeout_s": 30.0, "backoff_s": 1.0},
    "admin": {"token_file": "{directory}/admin.token"},
    "decision_log": "{directory}/decisions.jsonl",
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
    kind: str = "threshold"  # of the policy, where the scenario says none

    async def reference(self, scenario: Scenario = SCENARIOS[0]) -> dict[int, tuple[int, ...]]:
        """Ask a stock server, alone, all at once and under load; return the canaries whose answers are known.

        Known is what it always answers alike and would answer alike in whatever batch: the load here is one of many.

        Args:
            scenario: whose arguments the server has, but for the plugin's.
        """
        with serve(self._server(scenario), self.directory / f"stock-{scenario.name}.log") as server:
            async with _client() as session:
                options = self._options(server)
                alone = [await ask_canary(session, options, i, with_margins=True) for i in range(len(canary_prompts()))]
                traffic = Traffic()
                for _ in range(2):  # the second time with what the first has left in the cache
                    traffic.canaries += await _ask_all(session, options)
                async with Wave(session, options, traffic, seed=1).running() as wave:
                    await wave.swing(1)
        answers = [*alone, *traffic.canaries]
        kept = {each.prompt: each.tokens for each in alone if each.is_clear and len(each.tokens) == CANARY_TOKENS}
        return {i: t for i, t in kept.items() if {each.tokens for each in answers if each.prompt == i} == {t}}

    async def run(self, scenarios: Sequence[Scenario]) -> AsyncIterator[tuple[Scenario, Seen]]:
        """Run scenarios, one after the other on one server where they leave it as it was."""
        for group in by_server(scenarios):
            async for result in self._on_one_server(group):
                yield result

    async def _on_one_server(self, group: Sequence[Scenario]) -> AsyncIterator[tuple[Scenario, Seen]]:
        first = group[0]
        directory = self.directory / first.name
        directory.mkdir(parents=True, exist_ok=True)
        log, config = directory / "server.log", directory / "morph.yaml"
        config.write_text(yaml.safe_dump(self._settings(first, directory)), encoding="utf-8")
        with open(directory / "admin.token", "w", encoding="utf-8", opener=_for_owner) as token:
            token.write(secrets.token_hex(16))
        own_args = ("--plugin", "morphserve", "--morphserve-config", str(config))
        options = self._server(first, directory)
        refused = _start_on_full_disk(options, directory, own_args) if first.full_at_start else ""
        num_seen = 0
        try:
            with serve(options, log, own_args) as server:
                for scenario in group:
                    said = len(log.read_text(encoding="utf-8", errors="replace"))
                    seen = await self._stage(scenario, server, directory)
                    seen.exit_ended = True  # which the last one has to show
                    if scenario is group[-1]:
                        await _end(seen, server, asked=not scenario.ends)
                    seen.log = log.read_text(encoding="utf-8", errors="replace")[said:]
                    seen.fault_error = (refused if scenario is first else "") or seen.fault_error
                    num_seen += 1
                    yield scenario, seen
        except ReplayError as e:  # the other servers' scenarios go on
            for scenario in group[num_seen:]:
                yield scenario, Seen(Traffic(), fault_error=str(e))

    async def _stage(self, scenario: Scenario, server: Server, directory: Path) -> Seen:
        traffic = Traffic()
        seen = Seen(traffic)
        async with _client() as session:
            poller = Poller(session, server.url, lambda: traffic.zero)
            seen.snapshots = poller.snapshots
            polling = asyncio.create_task(poller.run(_POLL_S))

            def levels() -> tuple[int, int] | None:
                last = poller.snapshots[-1] if poller.snapshots else None
                return None if last is None else (last.level or 0, sum(last.transitions.values()))

            stage = Stage(
                session, self._options(server), int(server.pid or 0), Path(self.server.model), directory / "morph.yaml",
                Path(str(self._settings(scenario, directory).get("cache_dir", directory))), levels, traffic,
                directory / "says", (directory / "admin.token").read_text(encoding="utf-8"),
            )  # fmt: skip
            watching = asyncio.create_task(_watch(stage, seen))
            async with Wave(session, stage.options, traffic, seed=len(scenario.name)).running() as wave:
                await self._break(scenario, stage, wave, seen)
            await asyncio.gather(*stage.owed)
            if not scenario.ends:
                await _rest(seen, session, stage)
            for task in (polling, watching):
                task.cancel()
            await asyncio.gather(polling, watching, return_exceptions=True)
        return seen

    async def _break(self, scenario: Scenario, stage: Stage, wave: Wave, seen: Seen) -> None:
        """Do what the scenario is about, under a load that lasts at least as long."""
        is_over = False
        swinging = asyncio.create_task(wave.swing(self.num_swings, lambda: not is_over))
        seen.fault_s = time.perf_counter() - stage.traffic.zero
        try:
            await scenario.fault(stage)
        except (AssertionError, OSError, ValueError) as e:
            seen.fault_error = f"{type(e).__name__}: {e}"
        is_over = True
        if scenario.ends:
            swinging.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await swinging

    def _settings(self, scenario: Scenario, directory: Path) -> dict[str, Any]:
        policy = {"policy": {"kind": self.kind, **POLICIES[self.kind]}}
        return {**_filled(COMMON, directory), **policy, **self.settings, **_filled(scenario.settings, directory)}

    def _server(self, scenario: Scenario, directory: Path | None = None) -> ChaosServer:
        """Return the server of a scenario: with the library where it is told a directory for that."""
        args, binds = scenario.serve_args, self.server.cpu_bind
        if scenario.num_ranks > 1:
            args = (*args, "--tensor-parallel-size", str(scenario.num_ranks))
            binds = "|".join(str(core) for core in range(scenario.num_ranks))
        more = scenario.environment
        if scenario.has_library and directory is not None:
            library = str(failing_library(directory))
            more += (("LD_PRELOAD", library), (SAYS, str(directory / "says")), (CACHE, str(directory / "cache")))
        extra_args = (*self.server.extra_args, *args)
        return replace(self.server, extra_args=extra_args, cpu_bind=binds, more_environment=more)

    def _options(self, server: Server) -> ClientOptions:
        return ClientOptions(url=server.url, model=self.server.served_model_name, request_timeout_s=REQUEST_TIMEOUT_S)


async def _watch(stage: Stage, seen: Seen) -> None:
    """Look at the status until cancelled."""
    while True:
        if (status := await stage.status()) is not None:
            seen.statuses.append(status)
        await asyncio.sleep(_STATUS_S)


async def _rest(seen: Seen, session: aiohttp.ClientSession, stage: Stage) -> None:
    """Wait for level 0, and ask all canaries there, at once."""
    begin = time.perf_counter()
    if await until(lambda: stage.level == 0, RESTORED_WITHIN_S):
        seen.restored_s = time.perf_counter() - begin
        stage.traffic.canaries += await _ask_all(session, stage.options)
        await asyncio.sleep(1.0)
        await until(lambda: stage.level == 0, RESTORED_WITHIN_S)  # four at once are a load, to some policies
    seen.status = await stage.status_from_now()


async def _ask_all(session: aiohttp.ClientSession, options: ClientOptions) -> list[CanaryAnswer]:
    return await asyncio.gather(*(ask_canary(session, options, prompt) for prompt in range(len(canary_prompts()))))


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
    # A connection that is kept may be closed by the server just as the next request is written into it.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session


def _start_on_full_disk(options: ChaosServer, directory: Path, own_args: tuple[str, ...]) -> str:
    """Start a server that cannot write below its cache; return what is wrong with how it ends, '' if nothing is."""
    says = directory / "says"
    says.write_text("no-write\n", encoding="utf-8")
    try:
        with serve(options, directory / "full.log", own_args):
            return "the server started although it could not write its cache"
    except ReplayError as e:
        return "" if os.strerror(errno.ENOSPC) in str(e) else f"a full disk is not named: {e}"
    finally:
        says.unlink()


def _filled(settings: Any, directory: Path) -> Any:
    """Return settings with the directory in the place of its name."""
    if isinstance(settings, Mapping):
        return {key: _filled(value, directory) for key, value in settings.items()}
    return settings.format(directory=directory) if isinstance(settings, str) else settings


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
