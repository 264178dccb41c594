"""What does a format cost? Teacher-forced KL of every layer in it against full precision, in the serving kernels.

Loads MODEL in vLLM with MorphServe, feeds windows of real text at full precision and with ALL layers in one format
(or at every level of a profile's ladder), and compares the next-token distributions at every position.

Output columns: format or level, kl (mean nats per token, KL(full precision || it)), top1 (share of equal argmax),
ppl_base, ppl, and with --timed the time of a decode step over that of full precision.
Last stdout line: one JSON document; its "expected_kl" goes under `ladder:` of the YAML.

    python scripts/measure_kl.py ~/.cache/morphserve/models/smollm2-135m-instruct --text scripts/corpus/*.txt
"""

from __future__ import annotations

from morphserve.tools.profile.measure import main

if __name__ == "__main__":
    raise SystemExit(main(description=__doc__))
