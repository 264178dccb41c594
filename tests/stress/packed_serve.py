"""The serve section of check_packed.py: `vllm serve`, stock and with the plugin, under a burst of HTTP requests.

`morphserve replay` starts both on the stub driver, with a tokenizer of numbers: an API server, an engine core of its
own process, the default policy and the default ladder. Kernels compute nothing, see packed_engine.py, so nothing is
said of speed or tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from packed_rows import Missed, keep_rows_apart, row, want

from morphserve.version import UNPROVEN_CUDA

NAME = "packed_serve"  # of the entry point; vLLM loads it in every section, where VLLM_PLUGINS names none
_WORDS = 1000  # of the tokenizer: fewer than the model's tokens
_REQUESTS, _PROMPT, _ANSWER = 48, 100, 200
_SIZES = [1, 2, 4, 8, 16]


def register() -> None:
    """Do what kernels would have done, in engine-core processes: an entry point of group vllm.general_plugins."""
    if NAME in os.environ.get("VLLM_PLUGINS", "") and "vllm.v1.engine.core" in sys.modules:
        from packed_engine import stand_in

        stand_in()


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer whose words are numbers."""
    vocab = {"[UNK]": 0, **{str(number): number for number in range(1, _WORDS)}}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    parts = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    (directory / "tokenizer.json").write_text(json.dumps(parts))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def run() -> None:
    """Stock, then the plugin with nothing said."""
    here, out = Path.cwd(), Path("served").resolve()
    write_tokenizer(here)
    text = "\n".join(" ".join(str(1 + (line * 7 + i) % (_WORDS - 1)) for i in range(40)) for line in range(200))
    (here / "text.txt").write_text(text)
    requests = ({"timestamp": 20 * i, "input_length": _PROMPT, "output_length": _ANSWER} for i in range(_REQUESTS))
    (here / "burst.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in requests))
    graphs = json.dumps({"cudagraph_capture_sizes": _SIZES})
    command = [
        sys.executable, "-m", "morphserve", "replay", "--workload", "burst.jsonl", "--model", ".", "--out", str(out),
        "--compare", "stock,morphserve", "--corpus", "text.txt", "--num-blocks", "0", "--block-size", "16",
        "--max-model-len", "512", "--max-num-seqs", "16", "--slo-ttft-s", "0.5",
        "--serve-arg=--load-format=dummy", "--serve-arg=--gpu-memory-utilization=0.5",
        f"--serve-arg=--compilation-config={graphs}", "--quiet",
    ]  # fmt: skip
    env = {UNPROVEN_CUDA: "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_PLUGINS": f"{NAME},morphserve"}
    done = subprocess.run(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True, check=False)
    row("replay", partial(want, done.returncode, 0))
    for log in sorted(out.glob("*/server.log")):
        print(f"--- {log}\n{log.read_text()}", file=sys.stderr)
    if done.returncode:
        return
    found = {told["name"]: told for told in json.loads((out / "summary.json").read_text())["figures"]}
    for name, told in found.items():
        row(f"{name} answers all", partial(_answered, told))
    row("goes down and comes back", partial(_morphed, found["morphserve"]))


def _answered(told: dict[str, Any]) -> str:
    want(told["statuses"], {"ok": _REQUESTS})
    return f"{told['sent']} requests, {told['output_tok_s']:.0f} tokens/s"


def _morphed(told: dict[str, Any]) -> str:
    if not told["transitions"]:
        raise Missed(f"no transition: {told}")
    if told["level_zero_after_s"] is None:
        raise Missed(f"level 0 was not reached again: {told}")
    return f"transitions {told['transitions']}, tokens by level {told['tokens_by_level']}"


if __name__ == "__main__":
    keep_rows_apart()
    run()
