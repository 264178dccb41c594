"""Command line of scripts/measure_kl.py, which says what it is for; `measure_apart` runs it for others."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morphserve.errors import MorphServeError, ProfilingError
from morphserve.serve_dtype import add_dtype_option, resolve_dtype

Levels = Sequence[Mapping[int, str]]  # decoder layer id |-> format; the others are at full precision


def main(argv: list[str] | None = None, description: str = "What does a format cost?") -> int:
    """See scripts/measure_kl.py."""
    args = _parser(description).parse_args(argv)
    try:
        document = _measure(args)
    except MorphServeError as error:
        sys.stderr.write(f"measure_kl: {error}\n")
        return 1
    for name, row in zip(document["expected_kl"], document["rows"], strict=True):
        timed = f"  step {row['step_time_factor']:.2f}" if args.timed else ""
        sys.stdout.write(
            f"{name}  kl {row['kl']:.4f}  top1 {row['top1']:.3f}  ppl_base {row['ppl_base']:.2f}  "
            f"ppl {row['ppl']:.2f}{timed}\n"
        )
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


def measure_apart(model: str, levels: Levels, *arguments: object) -> dict[str, Any]:
    """Run this command in a process of its own, as vLLM binds and fills the one that it is in.

    Args:
        model: directory or hub name.
        levels: what is measured.
        arguments: further words of the command line.

    Returns:
        The command's JSON document; its `rows` are in the order of the levels.

    Raises:
        ProfilingError: it failed, with its last words.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "levels.json"
        file.write_text(json.dumps([dict(level) for level in levels]), encoding="utf-8")
        command = [sys.executable, "-m", __name__, model, "--levels", file, *arguments]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise ProfilingError(f"the levels could not be measured (vLLM said: {done.stderr.strip()[-500:]}).")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def _parser(description: str) -> argparse.ArgumentParser:
    from morphserve.control import DEFAULT_FORMATS
    from quant_layers import FORMATS

    parser = argparse.ArgumentParser(
        prog="measure_kl", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="text files, one domain each")
    parser.add_argument("--windows", type=int, default=5, help="windows per file")
    parser.add_argument("--offset", type=float, default=0.0, help="where in its share of the file a window starts")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--profile", help="directory made by scripts/profile_layers.py")
    parser.add_argument("--variant", action="append", default=[], metavar="FORMAT=CHECKPOINT",
                        help="where a format's layers come from")  # fmt: skip
    parser.add_argument("--kernel", action="append", default=[], metavar="FORMAT=NAME", help="which kernel runs it")
    parser.add_argument("--formats", nargs="+", default=list(DEFAULT_FORMATS), choices=list(FORMATS))
    parser.add_argument(
        "--levels", "--rungs", type=Path, help="JSON: a list of {layer: format}, to measure instead of formats"
    )
    parser.add_argument("--predict-text", nargs="+", type=Path, help="measure on this text too, as `kl_predicted`")
    parser.add_argument("--predict-windows", type=int, help="of that text, per file; default: as many as --windows")
    parser.add_argument("--predict-offset", type=float, default=0.0, help="like --offset, for that text")
    parser.add_argument("--timed", action="store_true", help="also measure decode steps")
    parser.add_argument("--compiled", action="store_true", help="as a server runs by default")
    add_dtype_option(parser)
    return parser


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from morphserve.integration.offline.served_model import ServedModel, measure_levels
    from morphserve.tools.profile.text import token_windows

    dtype = resolve_dtype(args.dtype, args.model)
    levels = _read_levels(args.levels)
    formats = list(dict.fromkeys(fmt for level in levels for fmt in level.values()) or dict.fromkeys(args.formats))
    settings = _settings(args, formats)
    with ServedModel(args.model, args.length, settings, enforce_eager=not args.compiled, dtype=dtype) as model:
        names = [f"level {index}" for index in range(len(levels))] or formats
        levels = levels or [dict.fromkeys(range(model.num_layers), fmt) for fmt in formats]
        texts = token_windows(model.tokenizer, args.text, args.windows, args.length, args.offset).tolist()
        rows = measure_levels(model, levels, texts, args.timed)
        if args.predict_text is not None:
            count = args.predict_windows or args.windows
            predict = token_windows(model.tokenizer, args.predict_text, count, args.length, args.predict_offset)
            for row, predicted in zip(rows, measure_levels(model, levels, predict.tolist()), strict=True):
                row["kl_predicted"] = predicted["kl"]
    return {
        "positions": len(texts) * (args.length - 1),
        "expected_kl": {name: round(row["kl"], 4) for name, row in zip(names, rows, strict=True)},
        "kernels": model.description.kernels,
        "layer_bytes": model.description.layer_bytes,
        "rows": rows,
    }


def _read_levels(file: Path | None) -> list[dict[int, str]]:
    if file is None:
        return []
    return [{int(layer): fmt for layer, fmt in level.items()} for level in json.loads(file.read_text())]


def _settings(args: argparse.Namespace, formats: Sequence[str]) -> dict[str, Any]:
    of_profile = args.profile is not None and args.levels is not None
    return {
        "ladder": {"steps": "profile"} if of_profile else {"steps": [{"format": fmt} for fmt in formats]},
        "profile": args.profile,
        "variants": dict(pair.split("=", 1) for pair in args.variant),
        "kernels": dict(pair.split("=", 1) for pair in args.kernel),
        # What is dear is measured too: who serves the profile cuts it.
        **({"quality": {"max_kl_per_token": 1e6}} if of_profile else {}),
    }


if __name__ == "__main__":
    raise SystemExit(main())
