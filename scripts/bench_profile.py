"""What does profiling cost per layer as models grow deeper? Random Llamas of several depths, equal layers.

Times both sweeps of scripts/profile_layers.py (see morphserve/tools/profile/effects.py) and the greedy ladder.
Output columns: layers, seconds of the sweeps, per layer, seconds of the ladder.
Last stdout line: one JSON document [{"layers", "sweeps_s", "sweeps_s_per_layer", "ladder_s"}].

    python scripts/bench_profile.py --depths 12 24 48
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from morphserve.tools.command import command_parser, finish, say

_VOCABULARY = 4096
_SIZES = {"base": 16, "w8": 8, "w4": 5}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--depths", nargs="+", type=int, default=[12, 24, 48])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--windows", type=int, default=2, help="of 256 tokens")
    args = parser.parse_args(argv)
    rows = [_row(depth, args.hidden, args.windows) for depth in [args.depths[0], *args.depths]]
    for row in rows[1:]:  # the first one warms up
        say("  ".join(str(value) for value in row.values()))
    return finish(rows[1:])


def _row(depth: int, hidden: int, num_windows: int) -> dict[str, float]:
    """Seconds of both sweeps and of the ladder, of a random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from morphserve.tools.profile import ProfileJob, StreamedModel, Workspace, cost_of, price_layers
    from quant_layers import greedy

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=depth,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
        model = StreamedModel(directory)
        windows = torch.randint(0, _VOCABULARY, (num_windows, 256))
        job = ProfileJob(str(directory), (), directory, ("w8", "w4"), num_windows, 256, 2, 1, 0)
        start = time.perf_counter()
        cost = cost_of(price_layers(job, model, windows, Workspace(Path(scratch) / "work", {}))[0])
        swept = time.perf_counter()
        greedy(cost, lambda _, fmt: _SIZES[fmt])
        done = time.perf_counter()
    sweeps_s = swept - start
    return {
        "layers": depth,
        "sweeps_s": round(sweeps_s, 2),
        "sweeps_s_per_layer": round(sweeps_s / depth, 3),
        "ladder_s": round(done - swept, 2),
    }


if __name__ == "__main__":
    raise SystemExit(main())
