"""What does it do for me? Stock vLLM, then MorphServe, on a burst of real traffic that is fitted to this machine.

Obtains the demo model (SmolLM2-135M-Instruct, 98 MB to download, kept in ~/.cache/morphserve, or in MORPHSERVE_CACHE),
starts one server after the other, replays the burst against each, and writes a report. Some minutes. All that
`morphserve replay` can be told may be added, and goes before what is the demo's: --workload hybB, --dtype bfloat16.

With --get-model nothing is served: the last stdout line is the model's directory. Otherwise it is the JSON document of
`morphserve replay`.

    morphserve demo
    morphserve demo --full --out reports/demo
    vllm serve $(morphserve demo --get-model) --plugin morphserve
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from morphserve.cache import cache_root
from morphserve.commands.demo_model import obtain
from morphserve.setup import SetupError
from morphserve.tools.command import command_parser, fail, say


def main(argv: Sequence[str] | None = None, prog: str = "morphserve demo") -> int:
    """Obtain the model and replay; returns the exit status."""
    parser = _parser(prog)
    args, words = parser.parse_known_args(argv)
    if args.get_model and words:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    try:
        model = args.model or str(obtain(cache_root(), full=args.verify))
    except SetupError as e:
        return fail(prog, e)
    except OSError as e:
        return fail(prog, f"{e}. Set MORPHSERVE_CACHE to a directory that can be written to.")
    if args.get_model:
        say(model)
        return 0
    from morphserve.tools import bench  # what it needs is not needed for the model alone

    status = bench.main([*_replay_words(model, args), *words], prog)
    if status == 0:
        sys.stderr.write(f"Serve it: vllm serve {model} --plugin morphserve\n")
    return status


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("--model", metavar="DIR", help="serve this model instead of the demo's")
    parser.add_argument("--full", action="store_true", help="add servers that are in W8 and in W4 for good")
    parser.add_argument("--no-fit", action="store_true", help="the burst and the limits as they are in the file")
    parser.add_argument("--get-model", action="store_true", help="obtain the model and print its directory, no more")
    parser.add_argument("--verify", action="store_true", help="compare the model's full hashes, not its sizes")
    return parser


def _replay_words(model: str, args: argparse.Namespace) -> list[str]:
    """Return the demo as a command line of `morphserve replay`; what is given after it goes before."""
    runs = "stock,morphserve,static_w8,static_w4" if args.full else "stock,morphserve"
    words = ["--workload", "convD", "--compare", runs, "--config", "demo", "--out", "reports/demo", "--model", model]
    return [*words, "--enforce-eager", *([] if args.no_fit else ["--fit"])]
