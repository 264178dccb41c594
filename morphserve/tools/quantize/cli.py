"""How do I get a better W4? Quantizes MODEL to 4 bits with calibration, into a checkpoint for `variants:`. AWQ or GPTQ.

Runs llm-compressor, which pins other versions of transformers and compressed-tensors than vLLM does, in a virtual
environment of its own (built once, about 2 minutes). Works without a GPU: SmolLM2-135M takes some minutes on two
cores. Mix domains in --text: GPTQ fits one domain and loses on others.

Last stdout line: one JSON document {"checkpoint", "method", "bits", "group_size", "seconds"}.

    morphserve quantize MODEL --method awq --text wikitext2-valid.txt --out checkpoints/smollm2-awq
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from morphserve.cache import cache_root
from morphserve.errors import ConfigError
from morphserve.hub import find_files
from morphserve.shipped import TEXT, text_file
from morphserve.tools.checks import at_least, check_directory, check_texts
from morphserve.tools.command import command_parser, fail
from morphserve.user_input import user_path

PACKAGES = ("llmcompressor==0.14.0.1", "accelerate>=1.0")
GROUP_SIZES = (128, 64, 32)
ENVIRONMENT = "quantize-env"  # in the cache directory


def main(argv: Sequence[str] | None = None, prog: str = "morphserve quantize") -> int:
    """Quantize in the environment of llm-compressor, made first where it is not there; returns the exit status."""
    args = _parser(prog).parse_args(argv)
    if args.out.exists():
        return fail(prog, f"{args.out} exists; give another --out, or delete it")
    try:
        check_directory(args.out, "--out")
        check_texts(args.text, "--text")
        environment = user_path(args.environment)
        check_directory(environment, "--environment")
        find_files(args.model, "model")
    except ConfigError as e:
        return fail(prog, e)
    python = _environment(environment, prog)
    if python is None:
        return 1
    # -P: the file's directory is no place to import from.
    command = [str(python), "-P", str(Path(__file__).with_name("compress.py")), json.dumps(_job(args, prog))]
    return subprocess.run(command).returncode


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("model", help="directory or hub name of the full-precision model")
    parser.add_argument("--method", choices=["awq", "gptq"], default="awq")
    parser.add_argument("--text", nargs="+", type=text_file, default=[TEXT], help="calibration text, one domain each; "
                        "better your own")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint; must not exist yet")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, help="default: the largest that fits the model")
    parser.add_argument("--samples", type=at_least(1), default=8, help="windows per text")
    parser.add_argument("--grid", type=at_least(1), default=10, help="AWQ: scalings tried for each norm; time grows "
                        "with it")  # fmt: skip
    parser.add_argument("--length", type=at_least(2), default=512, help="tokens per window")
    parser.add_argument("--environment", type=Path, default=cache_root() / ENVIRONMENT, metavar="DIR",
                        help="where llm-compressor is installed; default: %(default)s")  # fmt: skip
    return parser


def _job(args: argparse.Namespace, prog: str) -> dict[str, object]:
    """Return what `compress.py` is told."""
    return {
        "prog": prog,
        "model": args.model,
        "method": args.method,
        "text": [str(file) for file in args.text],
        "out": str(args.out),
        "group_sizes": [args.group_size] if args.group_size else list(GROUP_SIZES),
        "samples": args.samples,
        "grid": args.grid,
        "length": args.length,
    }


def _environment(directory: Path, prog: str) -> Path | None:
    """Return the environment's interpreter; install what is missing."""
    python = directory / "bin" / "python"
    stamp = directory / "installed"
    if python.exists() and stamp.exists() and stamp.read_text() == " ".join(PACKAGES):
        return python  # which is gone where the Python that it was made with is
    sys.stderr.write(f"{prog}: installing {PACKAGES[0]} into {directory}: a few minutes, once\n")
    for command in (
        [sys.executable, "-m", "venv", str(directory)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES],
    ):
        if (code := subprocess.run(command, stdout=sys.stderr).returncode) != 0:
            fail(prog, f"{' '.join(command[:4])} ... ended with {code}; see above")
            return None
    stamp.write_text(" ".join(PACKAGES))
    return python
