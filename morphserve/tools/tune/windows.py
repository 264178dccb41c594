"""The windows of a study: those it searches on, and those it only scores."""

from __future__ import annotations

from collections.abc import Sequence

from morphserve.tools.tune.errors import TuningError
from morphserve.tools.workload import Window, read_windows


def load_windows(dev: Sequence[str], held_out: Sequence[str]) -> tuple[list[Window], list[Window]]:
    """Read all of them.

    Raises:
        TuningError: no dev window, or a window that is both dev and held-out.
        WorkloadError: an option that is none, or a trace that cannot be read or of which nothing is left.
    """
    seen: dict[str, int] = {}
    groups = [read_windows(texts, seen) for texts in (dev, held_out)]
    if not groups[0]:
        raise TuningError("no dev window, and a policy is tuned on at least one. Give --dev TRACE.")
    both = {w.digest for w in groups[0]} & {w.digest for w in groups[1]}
    if both:
        names = ", ".join(w.source for w in groups[1] if w.digest in both)
        raise TuningError(
            f"held-out {names} is also a dev window: its score would say nothing about other traffic. Cut another one."
        )
    return groups[0], groups[1]
