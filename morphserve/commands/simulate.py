"""How would a burst fare with another policy, or on another load? As `morphserve replay`, in virtual time.

The controller, the monitor and the policies that serve, against a model of the engine: no server, no model, no
tokenizer, an hour of traffic in seconds. Runs on the step times that `morphserve calibrate` measured; options, report
and last stdout line are those of `morphserve replay`.

    morphserve simulate --workload convD --step-times step_times.json \\
        --compare stock,morphserve,mine --config demo --policy mine=mine.yaml --out reports/sim

With --clairvoyant a search that knows the future looks for the levels by time that cost the least KL, at no more late
requests than each run has: OUT/clairvoyant.md says what each run costs beyond that (its regret), and where the nats go.
It is a schedule that can be done, so a regret is at least what is said; docs/tuning.md tells how to read it. The last
line on stdout has "clairvoyant": {"frontier", "policies": [{"name", "late", "expected_kl_per_token", "regret", "best",
"schedule"}, ...]}, a schedule as pairs of seconds and level.

    morphserve simulate --workload convD --step-times step_times.json --compare stock,morphserve,static_w8 \\
        --config demo --clairvoyant --out reports/bound
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from morphserve.tools import bench


def main(argv: Sequence[str] | None = None, prog: str = "morphserve simulate") -> int:
    """Replay in virtual time; returns the exit status."""
    return bench.main(["--simulate", *(sys.argv[1:] if argv is None else argv)], prog, __doc__)
