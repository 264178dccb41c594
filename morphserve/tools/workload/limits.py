"""Times that the command lines have in common, and what they may be."""

from __future__ import annotations

import argparse
import math

from morphserve.tools.workload.errors import ReplayError

_ABOVE_0 = ("slo_ttft_s", "slo_tpot_ms", "request_timeout", "poll", "start_timeout")
_AT_LEAST_0 = ("cutoff",)


def check_times(args: argparse.Namespace) -> None:
    """Refuse times that are none, before anything is measured against them.

    Raises:
        ReplayError: one of the options, of those that there are.
    """
    for names, least, words in ((_ABOVE_0, math.ulp(0.0), "above 0"), (_AT_LEAST_0, 0.0, "0 or more")):
        for name in names:
            value = getattr(args, name, 1.0)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise ReplayError(f"--{name.replace('_', '-')} is {value:g}, must be a number {words}.")
