"""What does profiling cost per layer as models grow deeper? Random Llamas of several depths, equal layers.

Times both sweeps of scripts/profile_layers.py (see morphserve/tools/profile/effects.py) and the greedy ladder.
Output columns: layers, seconds of the sweeps, per layer, seconds of the ladder.
Last stdout line: one JSON document [{"layers", "sweeps_s", "sweeps_s_per_layer", "ladder_s"}].

    python scripts/bench_profile.py --depths 12 24 48
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", nargs="+", type=int, default=[12, 24, 48])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--windows", type=int, default=2, help="of 256 tokens")
    args = parser.parse_args(argv)

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from morphserve.tools.profile import (
        RoundToNearest,
        StreamedModel,
        Workspace,
        backward_sweep,
        cost_of,
        forward_sweep,
    )
    from quant_layers import greedy

    rows = []
    for depth in [args.depths[0], *args.depths]:  # the first one warms up
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096, hidden_size=args.hidden, intermediate_size=3 * args.hidden, num_hidden_layers=depth,
            num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 64, tie_word_embeddings=True,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / "model"
            LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
            model = StreamedModel(directory)
            windows = torch.randint(0, 4096, (args.windows, 256))
            start = time.perf_counter()
            workspace = Workspace(Path(scratch) / "work", {})
            arguments = forward_sweep(model, windows, workspace)
            scales = {i: {k: s.values for k, s in workspace.load("scales", i).items()} for i in range(depth)}
            variants = [RoundToNearest("w8", scales), RoundToNearest("w4")]
            cost = cost_of(backward_sweep(model, variants, arguments, workspace, num_draws=2, seed=0))
            swept = time.perf_counter()
            greedy(cost, lambda _, fmt: {"base": 16, "w8": 8, "w4": 5}[fmt])
            done = time.perf_counter()
        rows.append(
            {
                "layers": depth,
                "sweeps_s": round(swept - start, 2),
                "sweeps_s_per_layer": round((swept - start) / depth, 3),
                "ladder_s": round(done - swept, 2),
            }
        )
    for row in rows[1:]:
        sys.stdout.write("  ".join(str(value) for value in row.values()) + "\n")
    sys.stdout.write(json.dumps(rows[1:]) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
