"""Command line of scripts/measure_kl.py, which says what it is for; also run by morphserve/tools/profile/job.py."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from morphserve.serve_dtype import add_dtype_option, resolve_dtype


def main(argv: list[str] | None = None, description: str = "What does a format cost?") -> int:
    """See scripts/measure_kl.py."""
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
    parser.add_argument("--rungs", type=Path, help="JSON: a list of {layer: format}, to measure instead of formats")
    parser.add_argument("--predict-text", nargs="+", type=Path, help="measure on this text too, as `kl_predicted`")
    parser.add_argument("--predict-windows", type=int, help="of that text, per file; default: as many as --windows")
    parser.add_argument("--predict-offset", type=float, default=0.0, help="like --offset, for that text")
    parser.add_argument("--timed", action="store_true", help="also measure decode steps")
    parser.add_argument("--compiled", action="store_true", help="as a server runs by default")
    add_dtype_option(parser)
    args = parser.parse_args(argv)

    from morphserve.errors import MorphServeError
    from morphserve.integration.offline.served_model import ServedModel, measure_rungs
    from morphserve.tools.profile import token_windows

    rungs: list[dict[int, str]] = []
    if args.rungs is not None:
        rungs = [{int(layer): fmt for layer, fmt in rung.items()} for rung in json.loads(args.rungs.read_text())]
    formats = list(dict.fromkeys(fmt for rung in rungs for fmt in rung.values())) or args.formats
    of_profile = args.profile is not None and args.rungs is not None
    settings: dict[str, Any] = {
        "ladder": {"steps": "profile"} if of_profile else {"steps": [{"format": fmt} for fmt in formats]},
        "profile": args.profile,
        "variants": dict(pair.split("=", 1) for pair in args.variant),
        "kernels": dict(pair.split("=", 1) for pair in args.kernel),
    }
    try:
        dtype = resolve_dtype(args.dtype, args.model)
    except MorphServeError as error:
        sys.stderr.write(f"measure_kl: {error}\n")
        return 1
    model = ServedModel(args.model, args.length, settings, enforce_eager=not args.compiled, dtype=dtype)
    try:
        if rungs:
            names = [f"level {index}" for index in range(len(rungs))]
        else:
            names, rungs = formats, [dict.fromkeys(range(model.num_layers), fmt) for fmt in formats]
        texts = token_windows(model.tokenizer, args.text, args.windows, args.length, args.offset).tolist()
        rows = measure_rungs(model, rungs, texts, args.timed)
        if args.predict_text is not None:
            count = args.predict_windows or args.windows
            predict = token_windows(model.tokenizer, args.predict_text, count, args.length, args.predict_offset)
            for row, predicted in zip(rows, measure_rungs(model, rungs, predict.tolist()), strict=True):
                row["kl_predicted"] = predicted["kl"]
    except MorphServeError as error:
        sys.stderr.write(f"measure_kl: {error}\n")
        return 1
    finally:
        model.close()
    for name, row in zip(names, rows, strict=True):
        timed = f"  step {row['step_time_factor']:.2f}" if args.timed else ""
        sys.stdout.write(
            f"{name}  kl {row['kl']:.4f}  top1 {row['top1']:.3f}  ppl_base {row['ppl_base']:.2f}  "
            f"ppl {row['ppl']:.2f}{timed}\n"
        )
    document = {
        "positions": len(texts) * (args.length - 1),
        "expected_kl": {name: round(row["kl"], 4) for name, row in zip(names, rows, strict=True)},
        "kernels": model.description.kernels,
        "layer_bytes": model.description.layer_bytes,
        "rows": rows,
    }
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
