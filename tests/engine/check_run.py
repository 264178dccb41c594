"""Starts a server's engine on a tiny model in a process of its own: `check_run.py MODEL CACHE DTYPE`.

Walks to the deepest level and back, and ends with status 0 where all of that worked. Last line: {"started": true,
"formats": [...], "kernels": {...}, "restored": true}, or {"started": false, "error": "..."}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from engine.harness import engine, follow, morph_of, settle
from vllm import SamplingParams

from morphserve.errors import ConfigError

PROMPTS = [{"prompt_token_ids": [5 + i, 40 + 3 * i, 77, 9 + i] * 6} for i in range(4)]


def run(model: Path, cache: Path, dtype: str) -> dict[str, Any]:
    """With the ladder that nobody wrote down, of a model on which W4 was measured."""
    options = {"skip_tokenizer_init": True, "max_num_batched_tokens": 256, "max_num_seqs": 4, "dtype": dtype}
    with engine(model, cache, {"ladder": {"expected_kl": {"w4": 0.1}}}, **options) as llm:
        runtime = morph_of(llm).runtime
        params = SamplingParams(temperature=0.0, max_tokens=8, detokenize=False)

        def tokens() -> list[list[int]]:
            llm.reset_prefix_cache()
            return [list(answer.outputs[0].token_ids) for answer in llm.generate(PROMPTS, params, use_tqdm=False)]

        before, deepest = tokens(), len(runtime.ladder) - 1
        for level in (deepest, 0):
            follow(llm, {0: level})
            settle(llm, level)
            after = tokens()
        return {
            "started": True,
            "formats": list(dict.fromkeys(fmt for level in runtime.ladder for fmt in sorted(level.formats))),
            "kernels": runtime.ranks[0].kernels,
            "restored": after == before,
            "errors": morph_of(llm).status()["errors"],
        }


def main() -> None:
    try:
        found = run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except ConfigError as e:
        found = {"started": False, "error": str(e)}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
