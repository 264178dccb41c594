"""A comparison whose load and limits are fitted to a stock server before anything is compared."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from morphserve.tools.bench.comparison import STOCK, Comparison
from morphserve.tools.bench.report.console import ConsoleProgress
from morphserve.tools.bench.report.results import RunResult
from morphserve.tools.bench.runner import run_turns, turns
from morphserve.tools.bench.servers import GivenServers, StartedServers, start_server


def run_fitted(
    comparison: Comparison, fitted: Callable[[str], Comparison], progress: ConsoleProgress
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
    first = next(turns([comparison]))
    goes_on = first.name == STOCK
    directory, title = (first.directory, first.title) if goes_on else (comparison.out / "fit", "fit")
    with start_server(comparison, STOCK, directory, title, progress) as server:
        progress.fitting(title)
        comparison = fitted(server.url)
        planned = turns([comparison])
        on_it = GivenServers({STOCK: server}, progress)
        done = list(run_turns(islice(planned, 1 if goes_on else 0), on_it, progress))
    return comparison, [*done, *run_turns(planned, StartedServers(progress), progress)]
