"""Several policies on several windows, measured, and does the simulator say the same?

All servers are started once and take turns: a window is replayed against each of them, then the next window, then the
next repeat. Writes sweep.md and, per run, what scripts/replay.py writes (OUT/WINDOW/RUN.REPEAT/). Runs that are there
already are not measured again: an interrupted sweep goes on, and more --repeats add to it. With --step-times every run
is simulated too, on machines 0.9, 1.0 and 1.1 times as slow as calibrated, and compared.

With --simulate nothing is measured: hundreds of runs in a minute, --repeats of them with another seed of the noise.

Last stdout line: one JSON document.

    python scripts/sweep.py --model MODEL_DIR --config policies/yaml/demo.yaml --policy slo=slo.yaml \\
        --window scripts/workloads/convD.jsonl --window scripts/workloads/hybB.jsonl \\
        --compare stock,morphserve,slo,static_w8 --step-times step_times.json --repeats 3 --out reports/sweep

    python scripts/sweep.py --simulate --step-times step_times.json --window windows.yaml \\
        --config policies/yaml/demo.yaml --compare stock,morphserve --repeats 3 --out reports/simulated
"""

from __future__ import annotations

import sys
from pathlib import Path

from morphserve.tools.bench.sweep import main

if __name__ == "__main__":
    corpus = Path(__file__).resolve().parent / "corpus" / "wikitext2.txt"
    sys.exit(main(__doc__ or "", corpus))
