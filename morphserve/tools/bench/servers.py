"""Runs on real servers: one started for each run, or some that are up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from morphserve.tools.bench.comparison import Comparison
from morphserve.tools.bench.load.measure import measure
from morphserve.tools.bench.load.server import Server, serve
from morphserve.tools.bench.report.console import ConsoleProgress
from morphserve.tools.bench.report.results import Observed
from morphserve.tools.bench.runner import Turn


class GivenServers:
    """Implements `Backend` on servers that are up, by the names of their runs."""

    def __init__(self, servers: Mapping[str, Server], progress: ConsoleProgress) -> None:
        self._servers = servers
        self._progress = progress

    def run(self, turn: Turn) -> Observed:
        """Replay against the server of this name."""
        server, what = self._servers[turn.name], turn.measurement
        self._progress.measuring(turn.title, len(what.workload.requests))
        at_url = replace(what, client=replace(what.client, url=server.url))
        seen = asyncio.run(measure(at_url, self._progress.request_done))
        return replace(seen, setup={**server.setup, "servers_up": sorted(self._servers), **seen.setup})


class StartedServers:
    """Implements `Backend` with a server for each run, which is gone when the run ends."""

    def __init__(self, progress: ConsoleProgress) -> None:
        self._progress = progress

    def run(self, turn: Turn) -> Observed:
        """Start the server of this run, and replay against it."""
        with start_server(turn.comparison, turn.name, turn.directory, turn.title, self._progress) as server:
            return GivenServers({turn.name: server}, self._progress).run(turn)


@contextlib.contextmanager
def start_server(
    comparison: Comparison, name: str, directory: Path, title: str, progress: ConsoleProgress
) -> Iterator[Server]:
    """Start the server of a run; its config and its log go into `directory`.

    Args:
        title: the server's name for people.

    Raises:
        ReplayError: it does not start.
        ConfigError: a config that MorphServe would refuse.
    """
    config = comparison.write_config(name, directory)
    own_args = ("--plugin", "morphserve", "--morphserve-config", str(config.resolve())) if config else ()
    progress.starting(title)
    with serve(comparison.server, directory / "server.log", own_args, progress.waiting) as server:
        yield server
