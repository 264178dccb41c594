"""Which layers should be swapped first, into what, and what does each level cost? Profiles MODEL.

Two passes over the weights, one decoder layer at a time, price every layer in every format by what it does to the
model's answers on real text (see morphserve/tools/profile/effects.py), and find the input scales with which W8 loses
least. The ladder takes, move by move, what frees most bytes per KL. Its levels are then measured in the kernels
that serve them: on the calibration text (expected KL) and on other text (measured KL). `profile: DIR` in the
MorphServe config uses all of it.

A run that was killed goes on where it was: start it again with the same arguments.
Output columns: level, layers by format, those that have changed since the level before, expected KL, measured KL (nats
per token), MiB freed, step time over level 0.
Last stdout line: one JSON document {"profile", "ladder": [{"level", "expected_kl", "measured_kl", "bytes_freed",
"step_time_factor", "layers"}], "order", "seconds"}.

    morphserve profile MODEL --text wikitext2-valid.txt --out profiles/smollm2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from morphserve.shipped import TEXT, text_file
from morphserve.tools.checks import at_least, check_directory, check_new_file, check_texts
from morphserve.tools.command import command_parser, fail, finish, say

if TYPE_CHECKING:
    from quant_layers import Profile


def main(argv: Sequence[str] | None = None, prog: str = "morphserve profile") -> int:
    """Profile, or go on with it, and print the ladder; returns the exit status."""
    args = _parse(argv, prog)
    from morphserve.errors import MorphServeError
    from morphserve.tools.profile.inspect import ladder_table
    from quant_layers import QuantError

    try:
        profile, seconds = _run(args)
    except (MorphServeError, QuantError, OSError) as error:
        return fail(prog, error)
    say(ladder_table(profile))
    if args.plot is not None:
        from morphserve.tools.profile.plots import plot_frontier

        plot_frontier({args.out.name: profile.ladder}, args.plot)
    return finish(
        {
            "profile": str(args.out),
            "ladder": [level.as_json(index) for index, level in enumerate(profile.ladder)],
            "order": list(profile.order),
            "seconds": seconds,
        }
    )


def _parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    from morphserve.control import DEFAULT_FORMATS
    from morphserve.serve_dtype import add_dtype_option
    from morphserve.tools.apart import add_parallel_options
    from quant_layers import FORMATS

    parser = command_parser(__doc__, prog)
    parser.add_argument("model", help="directory or hub name")
    parser.add_argument("--text", nargs="+", type=text_file, default=[TEXT], help="calibration text, one domain each; "
                        "better your own")  # fmt: skip
    parser.add_argument("--eval-text", nargs="+", type=text_file, help="what levels are measured on; default: other "
                        "windows of the same text")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="directory of the profile; must not exist yet")
    parser.add_argument("--formats", nargs="+", default=list(DEFAULT_FORMATS), choices=list(FORMATS))
    parser.add_argument("--windows", type=at_least(1), default=6, help="windows per file")
    parser.add_argument("--length", type=at_least(2), default=512, help="tokens per window")
    parser.add_argument("--draws", type=at_least(1), default=2, help="answers drawn per token: more = less noise")
    parser.add_argument("--moves-per-level", type=at_least(1), default=5, help="changes from level to level")
    parser.add_argument("--halves", action="store_true", help="swap attention and MLP one by one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-measure", action="store_true", help="predict only; needs no vLLM")
    parser.add_argument("--plot", type=Path, help="PNG of what the levels free and cost")
    parser.add_argument("--compiled", action="store_true", help="measure step times with compiled models")
    add_parallel_options(parser)
    add_dtype_option(parser)
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> tuple[Profile, float]:
    """Return the profile, and the seconds that it took."""
    from rich.progress import Progress

    from morphserve.serve_dtype import AUTO, resolve_dtype
    from morphserve.tools.profile import ProfileJob, run_profile

    check_directory(args.out, "--out")
    if args.plot is not None:
        check_new_file(args.plot, "--plot")
    check_texts([*args.text, *(args.eval_text or ())], "--text")
    job = ProfileJob(
        args.model, tuple(args.text), args.out, tuple(args.formats), args.windows, args.length, args.draws,
        args.moves_per_level, args.seed, args.halves,
    )  # fmt: skip
    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("profiling", total=None)
        compiled = ("--compiled",) if args.compiled else ()
        dtype = resolve_dtype(args.dtype, args.model) or AUTO
        ranks = ("-tp", str(args.tensor_parallel_size), "-pp", str(args.pipeline_parallel_size))
        measure = None if args.no_measure else ("--dtype", dtype, *ranks, *compiled)
        return run_profile(
            job, measure, tuple(args.eval_text or ()),
            lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )  # fmt: skip
