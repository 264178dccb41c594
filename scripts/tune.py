"""Which policy suits my traffic? Tunes one on simulated windows of one's own traces, in minutes, without a server.

Searches the keys that --space names for few SLO violations at little quality cost (expected KL per token), scores what
it finds on windows that it did not search on, and writes into --out: report.md, pareto.png, importance.png, trials.csv,
one complete MorphServe YAML for each limit of --constraints (best_le_1pct.yaml: at most 1 % violations, least cost),
and study.journal, an Optuna study. An interrupted study goes on where it stopped, and ends as if it never had; a study
with other settings is refused. Everything is simulated from --step-times: measure what you choose with
scripts/replay.py.

Columns of trials.csv: trial, state, on_front, dev_violation_rate, dev_expected_kl_per_token, the same two held_out (of
the front), dev_transitions, dev_preemptions, the two of each dev window, every key of the space, reason (of a refusal).

The last line on stdout is one JSON document: {"made", "trials": {"total", "complete", "pruned"}, "anchors": [{"name",
"dev", "held_out"}], "front": [{"trial", "dev", "held_out"}], "best": [{"max_violation_rate", "trial", "dev",
"held_out", "values", "verdict", "file"}], "importance", "warnings", "report", "study"}.

Example:
    python scripts/tune.py --config policies/yaml/demo.yaml --step-times step_times.json \\
        --dev scripts/workloads/convD.jsonl --dev scripts/workloads/hybB.jsonl:rate_scale=1.2 \\
        --held-out scripts/workloads/hybA.jsonl --trials 300 --seed 0 --out reports/tune
"""

from __future__ import annotations

import sys
from pathlib import Path

from morphserve.tools.tune import main

if __name__ == "__main__":
    sys.exit(main(__doc__ or "", Path(__file__).resolve().parents[1] / "policies" / "yaml" / "space.yaml"))
