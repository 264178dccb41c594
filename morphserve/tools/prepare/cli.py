"""Measure, once, what MODEL loses and how fast it is at each level, in the engine that will serve it.

Profiles its layers on text (which to swap first, into what, and the input scales with which 8 bits lose least),
measures the levels that follow in the kernels that serve them, and times engine steps. Each finished part is kept,
named by what it was measured of, and a server that is started with the same options finds it by itself. A run that was
killed goes on where it was. The exit status is 75 where another process prepares the same model.

    morphserve prepare MODEL
    vllm serve MODEL --plugin morphserve
    morphserve prepare MODEL -tp 2 --dtype float16 --enforce-eager      # with options of the server
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morphserve.config import MorphServeConfig
from morphserve.errors import MorphServeError, ProfilingError
from morphserve.serve_dtype import AUTO, add_dtype_option, resolve_dtype
from morphserve.shipped import text_file
from morphserve.tools.apart import add_bind_option, add_parallel_options, bind_cores
from morphserve.tools.checks import at_least, check_directory, check_texts
from morphserve.tools.command import command_parser, fail, finish
from morphserve.user_input import user_path


def main(argv: Sequence[str] | None = None, prog: str = "morphserve prepare") -> int:
    """Prepare a model; exit status 0 when all of it is there."""
    args = _parser(prog).parse_args(argv)
    bind_cores(args)
    from morphserve.prepared import TAKEN, TakenError
    from quant_layers import QuantError

    try:
        document = _prepare(args)
    except KeyboardInterrupt:
        fail(prog, "interrupted. What was finished is kept: the same command goes on from there.")
        return 130
    except TakenError as e:
        fail(prog, e)
        return TAKEN
    except (MorphServeError, QuantError, OSError, ValueError) as e:
        return fail(prog, e)
    return finish(document) if args.json else 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("model", help="directory or hub name")
    server = parser.add_argument_group("as the server will be started")
    add_dtype_option(server)
    add_parallel_options(server)
    server.add_argument("--enforce-eager", action="store_true", help="no torch.compile")
    server.add_argument("--max-model-len", type=at_least(2), default=2048, metavar="N", help="longest request that is "
                        "timed")  # fmt: skip
    server.add_argument("--max-num-seqs", type=at_least(1), default=64, metavar="N", help="largest step that is timed")
    server.add_argument("--max-num-batched-tokens", type=at_least(1), metavar="N", help="default: vLLM's own")
    add_bind_option(server)
    parser.add_argument("--text", nargs="+", type=text_file, help="calibration text, one file a domain; default: a "
                        "part of WikiText-2 that comes along")  # fmt: skip
    parser.add_argument("--windows", type=at_least(1), default=6, help="windows of 512 tokens per file")
    parser.add_argument("--with-w4", choices=["awq", "gptq"], help="also quantize it to 4 bits with calibration, for "
                        "the levels of 4 bits")  # fmt: skip
    parser.add_argument("--without-times", action="store_true", help="leave step times out: a server learns them from "
                        "its own steps")  # fmt: skip
    parser.add_argument("--cache-dir", type=Path, default=MorphServeConfig().cache_dir, metavar="DIR",
                        help="`cache_dir` of the server's settings")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="last line: one JSON document of what is where")
    return parser


def _prepare(args: argparse.Namespace) -> dict[str, Any]:
    from morphserve.hub import find_files
    from morphserve.prepared import Store, weights_fingerprint
    from morphserve.tools.prepare.display import show_progress
    from morphserve.tools.prepare.request import Request
    from morphserve.tools.prepare.stages import Preparation

    check_texts(args.text or (), "--text")
    cache_dir = user_path(args.cache_dir)
    check_directory(cache_dir, "--cache-dir")
    directory = find_files(args.model, "model").resolve()
    weights = weights_fingerprint(directory)
    if weights is None:
        raise ProfilingError(f"{directory} has no config.json and safetensors that can be read. Fetch the model again.")
    request = Request(
        model=str(directory),
        dtype=resolve_dtype(args.dtype, str(directory)) or AUTO,
        tensor_parallel=args.tensor_parallel_size,
        pipeline_parallel=args.pipeline_parallel_size,
        enforce_eager=args.enforce_eager,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    with show_progress(sys.stderr) as progress:
        preparation = Preparation(request, Store(cache_dir, weights), cache_dir, progress)
        document = preparation.run(args.text, args.windows, args.with_w4, not args.without_times)
    for line in preparation.said:
        sys.stdout.write(f"{line}\n")
    return document
