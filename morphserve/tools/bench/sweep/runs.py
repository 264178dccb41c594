"""Every run on every window: measured on servers that are all up at once and take turns, or simulated."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from morphserve.tools.bench.comparison import Comparison
from morphserve.tools.bench.report.console import ConsoleProgress
from morphserve.tools.bench.report.tables import Row
from morphserve.tools.bench.runner import Backend, Turn, run_turns, turns
from morphserve.tools.bench.servers import GivenServers, start_server
from morphserve.tools.workload import ReplayError

Found = dict[tuple[str, str], list[Row]]  # by window and run, one row a repeat


def measure_all(comparisons: Sequence[Comparison], progress: ConsoleProgress) -> Found:
    """Measure what is not measured yet.

    Servers are started once, so a run costs no more than its traffic; what is idle meanwhile shares the machine. A run
    whose result.json is there already is not measured again.

    Args:
        comparisons: by window; they differ in workload, prompts and directory only.

    Raises:
        ReplayError: a server does not start or does not answer, or a result cannot be read or is of something else.
    """
    # Once, before anything runs: the servers keep the config they were started with.
    asked = {(c.window, name): _asked(c, name) for c in comparisons for name in c.names}
    planned = [replace(turn, setup={"asked": asked[turn.key]}) for turn in turns(comparisons, rotate=True)]
    rows = {turn.directory: _read(turn) for turn in planned if _file(turn).is_file()}
    missing = [turn for turn in planned if turn.directory not in rows]
    some, needed = comparisons[0], {turn.name for turn in missing}
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(start_server(some, name, some.out.parent / "servers" / name, name, progress))
            for name in some.names
            if name in needed
        }
        for result in run_turns(missing, GivenServers(servers, progress), progress):
            rows[result.directory] = result.figures()
    found: Found = {}
    for turn in planned:
        found.setdefault(turn.key, []).append(rows[turn.directory])
    return found


def simulate_all(comparisons: Sequence[Comparison], engine: Backend) -> Found:
    """Simulate all of it; repeats differ in the seed of the noise, and nothing is kept of them but their config.

    Raises:
        ConfigError, WorkloadError: a server would refuse the config, or a request.
    """
    found: Found = {}
    for turn in turns(comparisons):
        turn = replace(turn, directory=turn.comparison.out / f"{turn.name}.simulated")
        found.setdefault(turn.key, []).append(turn.result(engine.run(turn)).figures())
    return found


def _file(turn: Turn) -> Path:
    return turn.directory / "result.json"


def _asked(comparison: Comparison, name: str) -> str:
    """Hash what a result depends on, but for machine, code and the files that the config names."""
    config = comparison.derived(name, comparison.out)
    config.pop("decision_log", None)  # where it goes changes nothing
    what = comparison.measurement
    own = json.dumps(config, sort_keys=True)
    server = comparison.server
    parts = (
        own, server.arguments(0, ()), server.cpu_bind, what.workload.requests, what.prompts, what.slo,
        what.client.cutoff_s, what.client.request_timeout_s,
    )  # fmt: skip
    if what.client.temperature:
        parts = (*parts, what.client.temperature)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _read(turn: Turn) -> Row:
    file = _file(turn)
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        figures, found = document["figures"], document["setup"]["asked"]
    except (OSError, ValueError, KeyError) as e:
        raise ReplayError(f"{file}: not the result of a run ({e!r}). Delete it, and the run is measured again.") from e
    if found != turn.setup["asked"]:
        raise ReplayError(
            f"{file}: measured with another config, server, workload or limit. Delete it, or give another --out."
        )
    return dict(figures)
