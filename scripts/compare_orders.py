"""Does the order in which layers are swapped matter, and which one is best? KL of the first n layers of each order.

Calibrates our order and the paper's (LIS) on --text with several seeds (other windows, other draws), then measures
all orders in the kernels that serve the format, on --eval-text. `block` is a run of layers in the model's middle.

Output columns: order, then for each n the KL against full precision (mean nats per token) and its standard
deviation over seeds where an order has any.
Last stdout line: one JSON document {"format", "counts", "orders": {name: {"kl": [...], "std": [...]}}}.

    python scripts/compare_orders.py MODEL --text wikitext2-valid.txt --eval-text wikitext2-test.txt qmsum-test.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    from quant_layers import FORMATS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or hub name")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="calibration text")
    parser.add_argument("--eval-text", nargs="+", type=Path, required=True)
    parser.add_argument("--format", default="w4", choices=list(FORMATS))
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4, 8, 15])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=4, help="calibration windows of 512 tokens per file")
    parser.add_argument("--eval-windows", type=int, default=5, help="of 512 tokens per file")
    parser.add_argument("--plot", type=Path, help="PNG of the KL by number of layers")
    parser.add_argument("--no-lis", action="store_true", help="leave the paper's order out: it takes minutes a seed")
    args = parser.parse_args(argv)

    from morphserve.errors import MorphServeError
    from quant_layers import QuantError

    try:
        orders = _orders(args)
        found = _measure(args, orders)
    except (MorphServeError, QuantError, OSError) as error:
        sys.stderr.write(f"compare_orders: {error}\n")
        return 1
    if args.plot is not None:
        from morphserve.tools.profile.plots import plot_orders

        plot_orders(args.counts, found, args.plot)
    document = {"format": args.format, "counts": args.counts, "orders": found}
    for name, row in found.items():
        cells = (f"{kl:.4f} ±{std:.4f}" for kl, std in zip(row["kl"], row["std"], strict=True))
        sys.stdout.write(f"{name:<14}  " + "  ".join(cells) + "\n")
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


def _orders(args: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Name |-> one order a seed."""
    import transformers

    from morphserve.hub import find_files
    from morphserve.tools.profile import (
        RoundToNearest,
        StreamedModel,
        Workspace,
        backward_sweep,
        cost_of,
        forward_sweep,
        lis_order,
        swap_order,
        token_windows,
    )
    from quant_layers import greedy

    directory = find_files(args.model, "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = StreamedModel(directory)
    depth = len(model)
    ours, papers = [], []
    for seed in range(args.seeds):
        windows = token_windows(tokenizer, args.text, args.windows, 512, seed / args.seeds)
        with tempfile.TemporaryDirectory() as scratch:
            workspace = Workspace(Path(scratch) / "work", {})
            arguments = forward_sweep(model, windows, workspace)
            scales = {i: {k: s.values for k, s in workspace.load("scales", i).items()} for i in range(depth)}
            effects = backward_sweep(
                model, [RoundToNearest(args.format, scales)], arguments, workspace, num_draws=2, seed=seed
            )
        moves = greedy(cost_of(effects), lambda _, fmt: 2 if fmt == "base" else 1)  # equal layers: by KL alone
        ours.append(list(swap_order(moves, depth)))
        if not args.no_lis:
            papers.append(lis_order(model, windows[:1, :256], args.format))
        sys.stderr.write(f"seed {seed}: ours {ours[-1]}\n")
    shuffled = [random.Random(seed).sample(range(depth), depth) for seed in range(args.seeds)]
    return {
        "ours": ours,
        **({} if args.no_lis else {"LIS": papers}),
        "front to back": [list(range(depth))],
        "back to front": [list(range(depth))[::-1]],
        "random": shuffled,
        "ours reversed": [order[::-1] for order in ours],
    }


def _measure(args: argparse.Namespace, orders: dict[str, list[list[int]]]) -> dict[str, dict[str, list[float]]]:
    """KL of the first n layers of every order, each set of layers measured once."""
    depth = len(next(iter(orders.values()))[0])
    sets: dict[frozenset[int], float] = {}
    chosen = {(name, n): [frozenset(order[:n]) for order in rows] for name, rows in orders.items() for n in args.counts}
    for n in args.counts:
        chosen["block", n] = [frozenset(range((depth - n) // 2, (depth - n) // 2 + n))]
    wanted = list(dict.fromkeys(layers for rows in chosen.values() for layers in rows))
    with tempfile.TemporaryDirectory() as scratch:
        rungs = Path(scratch) / "rungs.json"
        rungs.write_text(json.dumps([dict.fromkeys(sorted(layers), args.format) for layers in wanted]))
        command = [sys.executable, "-m", "morphserve.tools.profile.measure", args.model, "--rungs", rungs]
        command += ["--text", *args.eval_text, "--windows", str(args.eval_windows)]
        done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise OSError(f"measuring ended with {done.returncode}")
    for layers, row in zip(wanted, json.loads(done.stdout.splitlines()[-1])["rows"], strict=True):
        sets[layers] = row["kl"]
    found: dict[str, dict[str, list[float]]] = {}
    for name in [*orders, "block"]:
        kls = [[sets[layers] for layers in chosen[name, n]] for n in args.counts]
        found[name] = {
            "kl": [statistics.mean(row) for row in kls],
            "std": [statistics.stdev(row) if len(row) > 1 else 0.0 for row in kls],
        }
    return found


if __name__ == "__main__":
    raise SystemExit(main())
