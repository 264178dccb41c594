"""Measures what full prefills take beside what was proven, in a process of its own: `proof_run.py MODEL CACHE`.

A process that has had other engines keeps free pages and scratch memory of theirs, and hides what a pass needs.
Last line: {"proven": bytes, "taken": {level: bytes}}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engine.harness import engine, follow, morph_of, settle
from vllm import SamplingParams

from morphserve.residence import peak_beyond_now

BATCH_TOKENS = 1024
LEVELS = (0, 2, 4)  # full precision, all layers in 8 bits, in 4 bits


def main() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1)
    prompts = [{"prompt_token_ids": [100 + 7 * i + k for k in range(500)]} for i in range(4)]
    taken = {}
    with engine(Path(sys.argv[1]), Path(sys.argv[2]), max_num_batched_tokens=BATCH_TOKENS) as llm:

        def prefill() -> None:
            llm.generate(prompts, params, use_tqdm=False)

        for level in LEVELS:
            follow(llm, {0: level})
            settle(llm, level)
            llm.reset_prefix_cache()
            prefill()  # what is allocated once and stays is no forward pass's
            llm.reset_prefix_cache()
            taken[level] = peak_beyond_now(prefill)
        proven = morph_of(llm).worst_forward_bytes
    sys.stdout.write("\n" + json.dumps({"proven": proven, "taken": taken}) + "\n")


if __name__ == "__main__":
    main()
