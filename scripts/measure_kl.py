"""What does a format cost? Teacher-forced KL of every layer in it against full precision, in the serving kernels.

Loads MODEL in vLLM with MorphServe, feeds windows of real text at level 0 and at the levels with ALL layers in one
format, and compares the next-token distributions at every position.

Output columns: format, kl (mean nats per token, KL(level 0 || format)), top1 (share of equal argmax), ppl_base, ppl.
Last stdout line: one JSON document; its "expected_kl" goes under `ladder:` of the YAML.

    python scripts/measure_kl.py ~/.cache/morphserve/models/smollm2-135m-instruct --text scripts/corpus/*.txt
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the logits are read inside the worker
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


class Capture:
    """Log-probabilities of every prompt position, taken where the model computes its logits."""

    def __init__(self, model: Any) -> None:
        self.rows: list[Any] = []
        original = model.compute_logits

        def compute_logits(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            logits = original(hidden, *args, **kwargs)
            if logits is not None and len(logits) > 1:  # the prompt; a lone row is the sampled token's
                self.rows.append(logits.float().log_softmax(-1))
            return logits

        model.compute_logits = compute_logits

    def take(self) -> Any:
        import torch

        rows, self.rows = self.rows, []
        return torch.cat(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="text files, one domain each")
    parser.add_argument("--windows", type=int, default=5, help="windows per file")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--profile", help="directory made by scripts/profile_layers.py")
    parser.add_argument("--formats", nargs="+", default=["w8", "w4"], choices=["w8", "w4"])
    args = parser.parse_args(argv)

    from vllm import LLM, SamplingParams

    from morphserve.errors import ProfilingError
    from morphserve.ladder import resolve_level
    from morphserve.profiling import token_windows
    from policies.types import Decision

    settings = {
        "ladder": {"steps": [{"format": fmt} for fmt in args.formats]},
        "policy": {"kind": "static", "level": 0},
        "profile": args.profile,
    }
    llm = LLM(
        args.model,
        enforce_eager=True,
        max_model_len=args.length + 32,
        max_num_batched_tokens=max(2048, args.length + 32),
        max_num_seqs=4,
        enable_prefix_caching=False,
        disable_log_stats=True,
        additional_config={"morphserve": settings},
    )
    core = llm.llm_engine.engine_core.engine_core
    morph = core.scheduler.morph
    try:
        texts = token_windows(llm.get_tokenizer(), args.text, args.windows, args.length).tolist()
    except ProfilingError as error:
        raise SystemExit(f"measure_kl: {error}") from error
    capture = Capture(core.model_executor.driver_worker.worker.model_runner.model)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)

    def logprobs(level: int, ids: list[int]) -> Any:
        morph.controller._policy = _Fixed(Decision(level, "measurement"))
        while morph.controller.level != level or morph.controller.target_level != level:
            morph.wake_due = True
            core.step_fn()
        llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        return capture.take()[: len(ids) - 1]

    levels = {fmt: resolve_level(morph.runtime.ladder, fmt) for fmt in args.formats}
    sums = {fmt: [0.0, 0.0, 0.0] for fmt in ["base", *levels]}  # kl, equal argmax, nll
    positions = 0
    for done, ids in enumerate(texts):
        base = logprobs(0, ids)
        target = base.new_tensor(ids[1:]).long().unsqueeze(1)
        positions += len(base)
        sums["base"][2] += -base.gather(1, target).sum().item()
        for fmt, level in levels.items():
            other = logprobs(level, ids)
            sums[fmt][0] += (base.exp() * (base - other)).sum().item()
            sums[fmt][1] += (base.argmax(-1) == other.argmax(-1)).sum().item()
            sums[fmt][2] += -other.gather(1, target).sum().item()
        sys.stderr.write(f"\rwindow {done + 1} of {len(texts)}")
    sys.stderr.write("\n")
    _report(sums, positions)
    llm.llm_engine.engine_core.shutdown()
    return 0


class _Fixed:
    """A policy with one answer."""

    def __init__(self, decision: Any) -> None:
        self._decision = decision

    def decide(self, signals: Any) -> Any:
        return self._decision


def _report(sums: dict[str, list[float]], positions: int) -> None:
    from math import exp

    ppl_base = exp(sums.pop("base")[2] / positions)
    for fmt, (kl, same, nll) in sums.items():
        sys.stdout.write(
            f"{fmt}  kl {kl / positions:.4f}  top1 {same / positions:.3f}  ppl_base {ppl_base:.2f}  "
            f"ppl {exp(nll / positions):.2f}\n"
        )
    document = {
        "positions": positions,
        "expected_kl": {fmt: round(figures[0] / positions, 4) for fmt, figures in sums.items()},
    }
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
