"""Measure every run on every window. All servers are up at once, and take turns."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morphserve.replay.compare import Comparison, Progress, measure_run, start_server
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
        ReplayError: a server does not start or does not answer, or a result cannot be read.
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
                    if not file.is_file():
                        server = servers[name]
                        setup = {"command": server.command, "servers_up": sorted(servers)}
                        result = measure_run(comparison, name, repeat, file.parent, server.url, setup, progress)
                        result.save()
                        progress.finished(result)
                    rows.setdefault((window, name), []).append(_read(file))
                turn += 1
    return rows


def _file(comparison: Comparison, name: str, repeat: int) -> Path:
    return comparison.out / f"{name}.{repeat}" / "result.json"


def _read(file: Path) -> Row:
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    except (OSError, ValueError, KeyError) as e:
        raise ReplayError(f"{file}: not the result of a run ({e!r}). Delete it, and the run is measured again.") from e
    return dict(figures)
