"""Does anything add up? Bursts for half an hour, and what is resident when the server is back at level 0.

Runs an engine in this process with the demo's policy. Each cycle sends a burst of mixed requests (short and long, half
with a common beginning), which takes the level down, waits for all answers and for level 0, and compares what the
kernel says is resident with what is published. Memory beside weights and KV cache is compared between the first quarter
of the cycles and the last, by medians: the first bursts take what is taken once.

oneDNN keeps the last 1,024 kernels that it compiled, one for each shape of a batch: with stock vLLM, too, they add up
for a long time. Here it keeps 16, so that what else grows is seen (ONEDNN_PRIMITIVE_CACHE_CAPACITY for another number).

Output columns: minutes, cycles, transitions, answers, published blocks' resident bytes off by (worst so far), other
memory (MiB). Last stdout line: one JSON document.

    python scripts/soak.py MODEL_DIR --minutes 30
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # steps are made here, and this process is what is measured
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")

_BURST = 40  # requests: more than level 0's blocks hold
_IDLE_STEP_S = 0.05


class _Soak:
    def __init__(self, llm: Any, seed: int) -> None:
        self._engine = llm.llm_engine
        self._core = llm.llm_engine.engine_core.engine_core
        self.morph = self._core.scheduler.morph
        self._draw = random.Random(seed)
        self._common = [self._draw.randrange(100, 5000) for _ in range(96)]
        self.num_answers = 0
        self.worst_off = 0.0
        self.other_mib: list[float] = []

    def cycle(self) -> None:
        """One burst, down and back."""
        self._burst()
        status = self._until_level_0()
        memory = self.morph.executor._executor.collective_rpc("morphserve_memory")[0]
        published = status["num_kv_blocks"] * self.morph.runtime.kv_block_bytes
        self.worst_off = max(self.worst_off, abs(memory["kv_resident_bytes"] / published - 1))
        other = memory["anonymous"] - memory["weight_bytes"] - memory["kv_resident_bytes"]
        self.other_mib.append(other / 2**20)

    def _burst(self) -> None:
        from vllm import SamplingParams

        for i in range(_BURST):
            prompt = self._common if self._draw.random() < 0.5 else []
            length = min(300, int(self._draw.lognormvariate(4, 0.8)) + 1)
            prompt = prompt + [self._draw.randrange(100, 5000) for _ in range(length)]
            params = SamplingParams(temperature=0.0, max_tokens=self._draw.randrange(8, 90), ignore_eos=True)
            self._engine.add_request(f"{self.num_answers}-{i}", {"prompt_token_ids": prompt}, params)
        while self._engine.has_unfinished_requests():
            self.num_answers += sum(output.finished for output in self._engine.step())

    def _until_level_0(self) -> dict[str, Any]:
        """The idle engine's steps, which a server makes by itself."""
        give_up = time.monotonic() + 120
        while True:
            status: dict[str, Any] = self.morph.status()
            if status["level"] == 0 and status["phase"] == "idle" and not self.morph.controller.in_transition:
                return status
            if time.monotonic() > give_up:
                raise SystemExit(f"soak: not back at level 0 after 120 s: {status}")
            time.sleep(_IDLE_STEP_S)
            self.morph.wake_due = True
            self._core.step_fn()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--config", type=Path, default=Path("policies/yaml/demo.yaml"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    import yaml
    from vllm import LLM

    llm = LLM(
        args.model,
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=49,
        max_model_len=512,
        max_num_seqs=64,
        disable_log_stats=True,
        additional_config={"morphserve": yaml.safe_load(args.config.read_text(encoding="utf-8"))},
    )
    soak = _Soak(llm, args.seed)
    start = shown = time.monotonic()
    while time.monotonic() - start < 60 * args.minutes or len(soak.other_mib) < 8:
        soak.cycle()
        if time.monotonic() - shown > 60:
            shown = time.monotonic()
            sys.stdout.write(
                f"{(shown - start) / 60:.0f} min  {len(soak.other_mib)}  {soak.morph.status()['transitions']}  "
                f"{soak.num_answers}  {soak.worst_off:.2%}  {soak.other_mib[-1]:.1f}\n"
            )
            sys.stdout.flush()
    status = soak.morph.status()
    quarter = len(soak.other_mib) // 4
    first, last = statistics.median(soak.other_mib[:quarter]), statistics.median(soak.other_mib[-quarter:])
    document = {
        "minutes": round((time.monotonic() - start) / 60, 1),
        "cycles": len(soak.other_mib),
        "answers": soak.num_answers,
        "transitions": status["transitions"],
        "errors": status["errors"],
        "failed": status["failed"],
        "kv_resident_off_worst": soak.worst_off,
        "other_mib_first_quarter": round(first, 2),
        "other_mib_last_quarter": round(last, 2),
        "grown_mib": round(last - first, 2),
    }
    sys.stdout.write(json.dumps(document) + "\n")
    llm.llm_engine.engine_core.shutdown()
    return int(status["failed"])


if __name__ == "__main__":
    raise SystemExit(main())
