"""What does a format cost? Teacher-forced KL of every layer in it against full precision, in the serving kernels.

Loads MODEL in vLLM with MorphServe, feeds windows of real text at full precision and with ALL layers in one format
(or at every level of a profile's ladder), and compares the next-token distributions at every position.

Output columns: format or level, kl (mean nats per token, KL(full precision || it)), top1 (share of equal argmax),
ppl_base, ppl, and with --timed the time of a decode step over that of full precision.
Last stdout line: one JSON document; its "expected_kl" goes under `ladder:` of the YAML.

    morphserve measure-kl ~/.cache/morphserve/models/smollm2-135m-instruct --text wikitext2
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from morphserve import cpu_tier
from morphserve.errors import ConfigError, MorphServeError
from morphserve.hub import find_files
from morphserve.serve_dtype import add_dtype_option, resolve_dtype
from morphserve.shipped import TEXT, text_file
from morphserve.tools.apart import Progress, add_parallel_options, counter, parallel_arguments, run_apart
from morphserve.tools.checks import at_least, between, check_texts
from morphserve.tools.command import command_parser, fail, finish
from morphserve.user_input import user_path
from policies import BASE_FORMAT

Levels = Sequence[Mapping[int, str]]  # decoder layer id |-> format; the others are at full precision


def main(argv: Sequence[str] | None = None, prog: str = "morphserve measure-kl") -> int:
    """Measure, and print a row for each format or level; returns the exit status."""
    args = _parser(prog).parse_args(argv)
    try:
        document = _measure(args)
    except (MorphServeError, OSError) as error:
        return fail(prog, error)
    for name, row in zip(document["expected_kl"], document["rows"], strict=True):
        timed = f"  step {row['step_time_factor']:.2f}" if args.timed else ""
        sys.stdout.write(
            f"{name}  kl {row['kl']:.4f}  top1 {row['top1']:.3f}  ppl_base {row['ppl_base']:.2f}  "
            f"ppl {row['ppl']:.2f}{timed}\n"
        )
    return finish(document)


def measure_apart(
    model: str, levels: Levels, *arguments: object, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Run this command in a process of its own, as vLLM binds and fills the one that it is in.

    Args:
        model: directory or hub name.
        levels: what is measured.
        arguments: further words of the command line.
        progress: hears how far it is.

    Returns:
        The command's JSON document; its `rows` are in the order of the levels.

    Raises:
        ProfilingError: it failed, with its last words.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "levels.json"
        file.write_text(json.dumps([dict(level) for level in levels]), encoding="utf-8")
        command = [sys.executable, "-m", __name__, model, "--levels", file, *arguments]
        return run_apart([*map(str, command)], "the levels could not be measured", "measuring levels", progress)


def _parser(prog: str) -> argparse.ArgumentParser:
    from morphserve.control import DEFAULT_FORMATS
    from quant_layers import FORMATS

    parser = command_parser(__doc__, prog)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", type=text_file, default=[TEXT], help="text files, one domain each")
    parser.add_argument("--windows", type=at_least(1), default=5, help="windows per file")
    parser.add_argument("--offset", type=between(0, 1), default=0.0, help="where in its share of the file a window "
                        "starts")  # fmt: skip
    parser.add_argument("--length", type=at_least(2), default=512, help="tokens per window")
    parser.add_argument("--profile", help="directory that `morphserve profile` made")
    parser.add_argument("--variant", action="append", default=[], metavar="FORMAT=CHECKPOINT",
                        help="where a format's layers come from")  # fmt: skip
    parser.add_argument("--kernel", action="append", default=[], metavar="FORMAT=NAME", help="which kernel runs it")
    parser.add_argument("--formats", nargs="+", default=list(DEFAULT_FORMATS), choices=list(FORMATS))
    parser.add_argument(
        "--levels", "--rungs", type=Path, help="JSON: a list of {layer: format}, to measure instead of formats"
    )
    parser.add_argument("--predict-text", nargs="+", type=text_file, help="measure on this text too, as `kl_predicted`")
    parser.add_argument("--predict-windows", type=at_least(1), help="of that text, per file; default: as many as "
                        "--windows")  # fmt: skip
    parser.add_argument("--predict-offset", type=between(0, 1), default=0.0, help="like --offset, for that text")
    parser.add_argument("--timed", action="store_true", help="also measure decode steps")
    parser.add_argument("--compiled", action="store_true", help="as a server runs by default")
    parser.add_argument("--cache-dir", type=Path, help="of the packed layers; default: the settings' own")
    add_parallel_options(parser)
    add_dtype_option(parser)
    return parser


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    levels, variants, kernels = _checked(args)  # before an engine takes its minutes
    from morphserve.integration.offline.served_model import ServedModel, measure_levels
    from morphserve.integration.start import device_type
    from morphserve.tools.profile.text import token_windows

    dtype = resolve_dtype(args.dtype, args.model)
    formats = list(dict.fromkeys(fmt for level in levels for fmt in level.values()) or dict.fromkeys(args.formats))
    settings = _settings(args, formats) | {"variants": variants, "kernels": kernels}
    with ServedModel(
        args.model, args.length, settings, enforce_eager=not args.compiled, dtype=dtype, **parallel_arguments(args)
    ) as model:
        if beyond := sorted({layer for level in levels for layer in level if layer >= model.num_layers}):
            raise ConfigError(f"--levels {args.levels}: layers {beyond}, the model has 0 to {model.num_layers - 1}.")
        names = [f"level {index}" for index in range(len(levels))] or formats
        levels = levels or [dict.fromkeys(range(model.num_layers), fmt) for fmt in formats]
        texts = token_windows(model.tokenizer, args.text, args.windows, args.length, args.offset).tolist()
        predict: list[list[int]] = []
        if args.predict_text is not None:
            count = args.predict_windows or args.windows
            found = token_windows(model.tokenizer, args.predict_text, count, args.length, args.predict_offset)
            predict = found.tolist()
        on_level = counter(len(levels) * (len(texts) + args.timed + len(predict)))
        rows = measure_levels(model, levels, texts, args.timed, on_level)
        if predict:
            for row, predicted in zip(rows, measure_levels(model, levels, predict, on_level=on_level), strict=True):
                row["kl_predicted"] = predicted["kl"]
    return {
        "positions": len(texts) * (args.length - 1),
        "expected_kl": {name: round(row["kl"], 4) for name, row in zip(names, rows, strict=True)},
        "dtype": str(model.engine.model_config.dtype).removeprefix("torch."),
        "tier": cpu_tier.tier() if device_type() == "cpu" else "",
        "kernels": model.description.kernels,
        "int8_activations": _round_to_8_bits(model.description.kernels),
        "layer_bytes": model.layer_bytes,
        "rows": rows,
    }


def _checked(args: argparse.Namespace) -> tuple[list[dict[int, str]], dict[str, str], dict[str, str]]:
    """Return levels, checkpoints and kernels by format, as far as they can be told from nonsense without an engine.

    Raises:
        MorphServeError: the option, what is wrong with it, and what it may be.
    """
    from quant_layers import CANDIDATES, FORMATS, Checkpoint, QuantError

    check_texts(args.text, "--text")
    check_texts(args.predict_text or (), "--predict-text")
    variants = by_format(args.variant, "--variant", FORMATS)
    for fmt, source in variants.items():
        try:
            Checkpoint.open(find_files(source, f"--variant {fmt}"))
        except QuantError as e:
            raise ConfigError(f"--variant {fmt}={source}: {e}") from e
    kernels = by_format(args.kernel, "--kernel", FORMATS)
    for fmt, name in kernels.items():
        known = [kernel.name for kernel in CANDIDATES if kernel.canonical.format == fmt]
        if name not in known:
            raise ConfigError(f"--kernel {fmt}={name}: kernels of {fmt} are {', '.join(known)}. Take one of these.")
    levels = read_levels(args.levels, FORMATS)
    find_files(args.model, "model")
    return levels, variants, kernels


def by_format(pairs: Sequence[str], option: str, known: Collection[str]) -> dict[str, str]:
    """Read `FORMAT=WHAT`, each format once.

    Raises:
        ConfigError: none, or of a format that there is not.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        fmt, is_pair, what = pair.partition("=")
        if not is_pair or not what or fmt not in known:
            raise ConfigError(f"{option} {pair}: must be FORMAT=..., and formats are {', '.join(known)}.")
        if fmt in found:
            raise ConfigError(f"{option} {pair}: {fmt} has {found[fmt]} already. Leave one out.")
        found[fmt] = what
    return found


def read_levels(file: Path | None, known: Collection[str]) -> list[dict[int, str]]:
    """Read a list of {layer: format}; none without a file.

    Raises:
        ConfigError: it is no such list, or names a format that there is not.
    """
    if file is None:
        return []
    from quant_layers import join_format, split_format

    try:
        raw = json.loads(user_path(file).read_text(encoding="utf-8"))
        levels = [{int(layer): split_format(fmt) for layer, fmt in level.items()} for level in raw]
    except OSError as e:
        raise ConfigError(f"--levels {file}: {e.strerror}. Give a readable JSON file.") from e
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise ConfigError(f"--levels {file}: {e}. It must be a JSON list of levels such as {{'0': 'w8'}}.") from e
    named = {half for level in levels for halves in level.values() for half in halves}
    if not levels or (unknown := sorted(named - {*known, BASE_FORMAT})):
        what = f"no format is called {', '.join(unknown)}" if levels else "no level is in it"
        raise ConfigError(f"--levels {file}: {what}. Formats are {', '.join(known)}, or two with / between.")
    if any(layer < 0 for level in levels for layer in level):
        raise ConfigError(f"--levels {file}: layers count from 0.")
    return [{layer: join_format(*halves) for layer, halves in level.items()} for level in levels]


def _round_to_8_bits(kernels: Mapping[str, str]) -> bool:
    """Return whether all of them round activations to 8 bits: then no other kernel of a CPU loses more."""
    from quant_layers import CANDIDATES

    return all(kernel.quantizes_activations for kernel in CANDIDATES if kernel.name in kernels.values())


def _narrow_last(fmt: str) -> int:
    from quant_layers import FORMATS

    return -FORMATS[fmt].bits


def _settings(args: argparse.Namespace, formats: Sequence[str]) -> dict[str, Any]:
    halves = dict.fromkeys(half for fmt in formats for half in fmt.split("/") if half != BASE_FORMAT)
    of_halves = any("/" in fmt for fmt in formats)  # of which layers only a profile's levels can be
    own = {} if args.cache_dir is None else {"cache_dir": str(args.cache_dir)}
    return own | {
        "ladder": {"steps": "profile" if of_halves else [{"format": f} for f in sorted(halves, key=_narrow_last)]},
        "profile": args.profile,
        # What is dear is measured too: who serves the profile cuts it.
        **({"quality": {"max_kl_per_token": 1e6}} if of_halves else {}),
    }


if __name__ == "__main__":
    raise SystemExit(main())
