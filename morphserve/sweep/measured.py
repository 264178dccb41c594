"""Measure every run on every window. All servers are up at once, and take turns."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morphserve.replay.compare import (
    STOCK,
    Comparison,
    Progress,
    derived_config,
    measure_run,
    start_server,
)
from morphserve.replay.errors import ReplayError

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
    rows: dict[tuple[str, str], list[Row]] = {}
    some = next(iter(comparisons.values()))
    names = some.names
    missing = {
        name
        for comparison in comparisons.values()
        for name in names
        for repeat in range(1, some.repeats + 1)
        if not _file(comparison, name, repeat).is_file()
    }
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(start_server(some, name, progress, some.out.parent / "servers" / name))
            for name in names
            if name in missing
        }
        turn = 0
        for repeat in range(1, some.repeats + 1):
            for window, comparison in comparisons.items():
                for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
                    file = _file(comparison, name, repeat)
                    asked = _asked(comparison, name)
                    if not file.is_file():
                        server = servers[name]
                        setup = {"command": server.command, "servers_up": sorted(servers), "asked": asked}
                        result = measure_run(comparison, name, repeat, file.parent, server.url, setup, progress)
                        result.save()
                        progress.finished(result)
                    rows.setdefault((window, name), []).append(_read(file, asked))
                turn += 1
    return rows


def _file(comparison: Comparison, name: str, repeat: int) -> Path:
    return comparison.out / f"{name}.{repeat}" / "result.json"


def _asked(comparison: Comparison, name: str) -> str:
    """What a result depends on, but for machine, code and the files that the config names."""
    config = {} if name == STOCK else derived_config(comparison.config_of(name), name, comparison.out)
    config.pop("decision_log", None)  # where it goes changes nothing
    what = comparison.measurement
    own = json.dumps(config, sort_keys=True)
    parts = (own, comparison.server.arguments(0, ()), what.workload.requests, what.slo, what.client.cutoff_s)
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
