"""Does the order in which layers are swapped matter, and which one is best? KL of the first n layers of each order.

Calibrates our order and the paper's (LIS) on --text with several seeds (other windows, other draws), then measures
all orders in the kernels that serve the format, on --eval-text. `inside out` is what a ladder takes without a profile,
`block` a run of layers in the model's middle. With --seeds 0 nothing is calibrated: the orders that anybody knows.

Output columns: order, then for each n the KL against full precision (mean nats per token) and its standard
deviation over seeds where an order has any.
Last stdout line: one JSON document {"format", "counts", "orders": {name: {"kl": [...], "std": [...]}}}.

    python scripts/compare_orders.py MODEL --text wikitext2-valid.txt --eval-text wikitext2-test.txt qmsum-test.jsonl
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path

from morphserve.tools.command import command_parser, fail, finish, say

Orders = dict[str, list[list[int]]]  # name |-> one order a seed, layer ids


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if args.seeds and not args.text:
        return fail("compare_orders", ValueError("--text is missing: give calibration text, or --seeds 0"))
    from morphserve.errors import MorphServeError
    from quant_layers import QuantError

    try:
        found = _measure(args, _orders(args))
    except (MorphServeError, QuantError, OSError) as error:
        return fail("compare_orders", error)
    if args.plot is not None:
        from morphserve.tools.profile.plots import plot_orders

        plot_orders(args.counts, found, args.plot)
    for name, row in found.items():
        cells = (f"{kl:.4f} ±{std:.4f}" for kl, std in zip(row["kl"], row["std"], strict=True))
        say(f"{name:<14}  " + "  ".join(cells))
    return finish({"format": args.format, "counts": args.counts, "orders": found})


def _parse(argv: list[str] | None) -> argparse.Namespace:
    from quant_layers import FORMATS

    parser = command_parser(__doc__)
    parser.add_argument("model", help="directory or hub name")
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="calibration text; not with --seeds 0")
    parser.add_argument("--eval-text", nargs="+", type=Path, required=True)
    parser.add_argument("--format", default="w4", choices=list(FORMATS))
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4, 8, 15])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=4, help="calibration windows of 512 tokens per file")
    parser.add_argument("--eval-windows", type=int, default=5, help="of 512 tokens per file")
    parser.add_argument("--plot", type=Path, help="PNG of the KL by number of layers")
    parser.add_argument("--no-lis", action="store_true", help="leave the paper's order out: it takes minutes a seed")
    return parser.parse_args(argv)


def _orders(args: argparse.Namespace) -> Orders:
    import transformers

    from morphserve.config import inside_out
    from morphserve.hub import find_files
    from morphserve.tools import profile
    from quant_layers import BASE, greedy

    directory = find_files(args.model, "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = profile.StreamedModel(directory)
    depth = len(model)
    ours, papers = [], []
    for seed in range(args.seeds):
        windows = profile.token_windows(tokenizer, args.text, args.windows, 512, seed / args.seeds)
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch) / "work"
            job = profile.ProfileJob(args.model, (), work, (args.format,), args.windows, 512, 2, 1, seed)
            effects, _ = profile.price_layers(job, model, windows, profile.Workspace(work, {}))
        moves = greedy(profile.cost_of(effects), lambda _, fmt: 2 if fmt == BASE else 1)  # equal layers: by KL alone
        ours.append(list(profile.swap_order(moves, depth)))
        if not args.no_lis:
            papers.append(profile.lis_order(model, windows[:1, :256], args.format))
        sys.stderr.write(f"seed {seed}: ours {ours[-1]}\n")
    orders = {
        "ours": ours,
        "LIS": papers,
        "front to back": [list(range(depth))],
        "back to front": [list(range(depth))[::-1]],
        "inside out": [inside_out(depth)],
        "random": [random.Random(seed).sample(range(depth), depth) for seed in range(args.seeds)],
        "ours reversed": [order[::-1] for order in ours],
    }
    return {name: rows for name, rows in orders.items() if rows}


def _measure(args: argparse.Namespace, orders: Orders) -> dict[str, dict[str, list[float]]]:
    """KL of the first n layers of every order, each set of layers measured once."""
    from morphserve.tools.profile import measure_apart

    depth = len(orders["front to back"][0])
    chosen = {name: [[frozenset(order[:n]) for order in rows] for n in args.counts] for name, rows in orders.items()}
    chosen["block"] = [[frozenset(range((depth - n) // 2, (depth - n) // 2 + n))] for n in args.counts]
    sets = list(dict.fromkeys(layers for by_count in chosen.values() for row in by_count for layers in row))
    levels = [dict.fromkeys(sorted(layers), args.format) for layers in sets]
    document = measure_apart(args.model, levels, "--text", *args.eval_text, "--windows", args.eval_windows)
    kl = {layers: row["kl"] for layers, row in zip(sets, document["rows"], strict=True)}
    found = {}
    for name, by_count in chosen.items():
        kls = [[kl[layers] for layers in row] for row in by_count]
        found[name] = {
            "kl": [statistics.mean(row) for row in kls],
            "std": [statistics.stdev(row) if len(row) > 1 else 0.0 for row in kls],
        }
    return found


if __name__ == "__main__":
    raise SystemExit(main())
