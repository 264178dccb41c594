"""How would a burst fare with another policy, or on another load? As `morphserve replay`, in virtual time.

The controller, the monitor and the policies that serve, against a model of the engine: no server, no model, no
tokenizer, an hour of traffic in seconds. Runs on the step times that `morphserve calibrate` measured; options, report
and last stdout line are those of `morphserve replay`.

    morphserve simulate --workload convD --step-times step_times.json \\
        --compare stock,morphserve,mine --config demo --policy mine=mine.yaml --out reports/sim
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from morphserve.tools import bench


def main(argv: Sequence[str] | None = None, prog: str = "morphserve simulate") -> int:
    """Replay in virtual time; returns the exit status."""
    return bench.main(["--simulate", *(sys.argv[1:] if argv is None else argv)], prog, __doc__)
