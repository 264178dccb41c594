"""A comparison whose load and limits are fitted to a stock server before anything is compared."""

from __future__ import annotations

from collections.abc import Callable

from morphserve.tools.bench.compare import (
    STOCK,
    Comparison,
    Progress,
    measure_on,
    run_all,
    run_directory,
    run_title,
    start_server,
)
from morphserve.tools.bench.report.results import RunResult


def run_fitted(
    comparison: Comparison, fitted: Callable[[str], Comparison], progress: Progress
) -> tuple[Comparison, list[RunResult]]:
    """Start a stock server, fit to it, run everything.

    Where the stock run is the first, it is measured on that server, so that no start is paid twice.

    Args:
        comparison: before fitting.
        fitted: the comparison for the stock server at this URL.

    Returns:
        The comparison that was run, and its results.

    Raises:
        ReplayError: a server does not start or does not answer.
    """
    comparison.check()
    goes_on = comparison.names[0] == STOCK
    directory = run_directory(comparison, STOCK, 1) if goes_on else comparison.out / "fit"
    title = run_title(comparison, STOCK, 1) if goes_on else "fit"
    done: list[RunResult] = []
    with start_server(comparison, STOCK, progress, directory, title) as server:
        progress.fitting(title)
        comparison = fitted(server.url)
        if goes_on:
            done.append(measure_on(comparison, STOCK, 1, server, progress))
    return comparison, run_all(comparison, progress, done)
