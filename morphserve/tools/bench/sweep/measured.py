"""Measure every run on every window. All servers are up at once, and take turns."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from morphserve.tools.bench.compare import STOCK, Comparison, Progress, derived_config, measure_run, start_server
from morphserve.tools.workload import ReplayError

Row = dict[str, Any]  # figures of one run, as RunResult.figures gives them


def measure_all(comparisons: Mapping[str, Comparison], progress: Progress) -> dict[tuple[str, str], list[Row]]:
    """Every run of every comparison, by window and name: one row a repeat.

    Servers are started once, so a run costs no more than its traffic; what is idle meanwhile shares the machine. Each
    repeat and window begins with another run, so that none always follows the same one. A run whose result.json is
    there already is not measured again.

    Args:
        comparisons: by window; they differ in workload, prompts and directory only.

    Raises:
        ReplayError: a server does not start or does not answer, or a result cannot be read or is of something else.
    """
    some = next(iter(comparisons.values()))
    # Once, before anything runs: the servers keep the config they were started with.
    asked = {(window, name): _asked(c, name) for window, c in comparisons.items() for name in c.names}
    turns = list(_turns(comparisons))
    found = {
        (window, name, repeat): _read(file, asked[window, name])
        for window, name, repeat in turns
        if (file := _file(comparisons[window], name, repeat)).is_file()
    }
    missing = {name for window, name, repeat in turns if (window, name, repeat) not in found}
    rows: dict[tuple[str, str], list[Row]] = {}
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(start_server(some, name, progress, some.out.parent / "servers" / name))
            for name in some.names
            if name in missing
        }
        for window, name, repeat in turns:
            row = found.get((window, name, repeat))
            if row is None:
                comparison, server = comparisons[window], servers[name]
                setup = {"command": server.command, "servers_up": sorted(servers), "asked": asked[window, name]}
                directory = _file(comparison, name, repeat).parent
                result = measure_run(comparison, name, repeat, directory, server.url, setup, progress)
                result.save()
                progress.finished(result)
                row = result.figures()
            rows.setdefault((window, name), []).append(row)
    return rows


def _turns(comparisons: Mapping[str, Comparison]) -> Iterator[tuple[str, str, int]]:
    """(window, run, repeat) in the order of measuring; each window and repeat begins with another run."""
    some = next(iter(comparisons.values()))
    turn = 0
    for repeat in range(1, some.repeats + 1):
        for window in comparisons:
            first = turn % len(some.names)
            for name in (*some.names[first:], *some.names[:first]):
                yield window, name, repeat
            turn += 1


def _file(comparison: Comparison, name: str, repeat: int) -> Path:
    return comparison.out / f"{name}.{repeat}" / "result.json"


def _asked(comparison: Comparison, name: str) -> str:
    """What a result depends on, but for machine, code and the files that the config names."""
    config = {} if name == STOCK else derived_config(comparison.config_of(name), name, comparison.out)
    config.pop("decision_log", None)  # where it goes changes nothing
    what = comparison.measurement
    own = json.dumps(config, sort_keys=True)
    server = comparison.server
    parts = (
        own, server.arguments(0, ()), server.cpu_bind, what.workload.requests, what.prompts, what.slo,
        what.client.cutoff_s, what.client.request_timeout_s,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _read(file: Path, asked: str) -> Row:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        figures, found = document["figures"], document["setup"]["asked"]
    except (OSError, ValueError, KeyError) as e:
        raise ReplayError(f"{file}: not the result of a run ({e!r}). Delete it, and the run is measured again.") from e
    if found != asked:
        raise ReplayError(
            f"{file}: measured with another config, server, workload or limit. Delete it, or give another --out."
        )
    return dict(figures)
