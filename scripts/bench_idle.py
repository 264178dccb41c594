"""What does the plugin cost while nothing morphs? Paired throughput of stock vLLM and MorphServe at level 0.

Both servers are up; closed-loop runs alternate between them, and each pair swaps the order. The ratio's
lower 97.5 % bound is a paired t bound. Output columns: pair, ratio (plugin over stock, output tokens/s).
Last stdout line: one JSON document.

    python scripts/bench_idle.py --model MODEL_DIR --pairs 8 [--enforce-eager]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from morphserve.serve_dtype import add_dtype_option, resolve_dtype
from morphserve.tools.bench import ClosedLoop, ServerOptions, compare_idle
from morphserve.tools.command import command_parser, run_command
from morphserve.tools.workload import load_encoder, read_corpus

CORPUS = Path(__file__).resolve().parent / "corpus" / "wikitext2.txt"


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--config", default="policies/yaml/demo.yaml", help="MorphServe YAML")
    parser.add_argument("--out", type=Path, default=Path("reports/idle"), help="server logs")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48, help="per run")
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--num-blocks", type=int, default=257, help="ample: nothing may ask for more KV")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--cpu-bind", default="0", help="core of both engines; the client needs another")
    add_dtype_option(parser)
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error(f"--pairs {args.pairs}: a spread needs at least 2")

    return run_command("bench_idle", lambda: _measure(args), "servers stopped")


def at_level_0(config: Path) -> dict[str, Any]:
    """Return settings by which the policy decides as always and goes nowhere: a slow machine may miss its promise."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    return {**settings, "policy": {"kind": "slo", **(settings.get("policy") or {}), "max_level": 0}}


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    ids = load_encoder(args.model)(read_corpus(CORPUS), False)
    prompts = [ids[i * 64 : i * 64 + 64] for i in range(args.requests)]
    stock = ServerOptions(
        model=args.model,
        num_blocks=args.num_blocks,
        dtype=resolve_dtype(args.dtype, args.model),
        enforce_eager=args.enforce_eager,
        cpu_bind=args.cpu_bind,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    config = args.out.resolve() / "morph.yaml"
    config.write_text(yaml.safe_dump(at_level_0(Path(args.config))), encoding="utf-8")
    plugin = replace(stock, extra_args=("--plugin", "morphserve", "--morphserve-config", str(config)))
    result, status = compare_idle(
        {"stock": stock, "plugin": plugin},
        args.out,
        ClosedLoop(prompts, args.concurrency, args.requests, args.output_tokens),
        args.pairs,
        lambda pair, ratio: print(f"pair {pair + 1}  {ratio:.4f}", file=sys.stderr, flush=True),
    )
    print(f"ratio {result.mean:.4f}, lower 97.5 % bound {result.lower:.4f}, {args.pairs} pairs")
    return {**result.as_json(), "eager": args.enforce_eager, "failed": status["failed"]}


if __name__ == "__main__":
    sys.exit(main())
