"""How does a burst of real traffic fare on stock vLLM, on MorphServe and on static quantized servers?

Replays a trace open-loop against each server in turn (started here, on the same machine with the same
memory, or given with --url) and writes a report: summary.md, summary.json, report.html, timeline.png, and
per run result.json (a superset of `vllm bench serve --save-result --save-detailed`), requests.csv,
series.csv, server.log.

With --fit a stock server is measured first, for less than a minute. Limits become the multiples of a lone request's
times that 2 s and 150 ms are on a CPU with VNNI; the workload is thinned, or sent faster, until stock would have two in
five requests late even if the machine were a fifth faster. What is given on the command line stays.

The last line on stdout is one JSON document: {"workload", "slo": {"ttft_s", "tpot_s"}, "dtype", "fit", "runs":
[{"name", "sent", "violation_rate", "ttft_violation_rate", "tpot_violation_rate", "ttft_p50_s", "ttft_p95_s",
"tpot_p50_ms", "tpot_p99_ms", "output_tok_s", "duration_s", "preemptions", "tokens_by_level", "expected_kl_per_token",
"transitions", "level_zero_after_s", "pause_max_ms"}, ...], "report"}; null where a run has no such figure.

Example:
    python scripts/replay.py --workload scripts/workloads/convD.jsonl --model MODEL_DIR \\
        --compare stock,morphserve --config policies/yaml/default.yaml --out reports/convD

    # the same without servers, and one more config beside it
    python scripts/replay.py --workload scripts/workloads/convD.jsonl --simulate --step-times times.json \\
        --compare stock,morphserve,mine --config policies/yaml/default.yaml --policy mine=mine.yaml --out reports/sim

    # cut a workload of one's own out of the Azure trace
    python scripts/replay.py --workload AzureLLMInferenceTrace_conv.csv --window 221,72 --thin 4.75 \\
        --input-scale 1/16 --input-clip 8,120 --output-clip 4,384 --save-workload mine.jsonl --dry-run
"""

from __future__ import annotations

import sys
from pathlib import Path

from morphserve.tools.bench import main

if __name__ == "__main__":
    corpus = Path(__file__).resolve().parent / "corpus" / "wikitext2.txt"
    sys.exit(main(__doc__ or "", corpus))
