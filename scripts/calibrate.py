"""How long does an engine step take, at every level? A few minutes of timed steps, fitted to a model.

Runs MODEL in an engine whose loop is in this process and whose worker has its own, as in a server. With all layers in
each format of the config's ladder in turn it times steps with 1 to 64 sequences, short and long contexts, with and
without a prefill among them. Fits, per format,

    seconds = base + per_seq * sequences + per_prefill_token * tokens + per_context_token * KV tokens

and measures what switching a layer takes, and what a server adds outside of the steps. Writes one JSON file: the
`slo` policy predicts with it, scripts/replay.py --simulate and scripts/tune.py run on it.

Output columns: format, the four coefficients, root mean square of the relative error; then, per format, what a decode
step takes over one in full precision of the same round, by sequences: median (least to most).
Last stdout line: one JSON document.

    python scripts/calibrate.py MODEL_DIR --config policies/yaml/demo.yaml --out step_times.json
"""

from __future__ import annotations

from morphserve.tools.profile.calibrate import main

if __name__ == "__main__":
    raise SystemExit(main(description=__doc__))
