"""Options of `scripts/replay.py`."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

from morphserve.serve_dtype import add_dtype_option
from morphserve.tools.bench import simulated
from morphserve.tools.bench.compare import STOCK
from morphserve.tools.workload import synthetic


def build_parser(description: str, corpus: Path) -> argparse.ArgumentParser:
    """All options; `corpus` is the default text for prompts."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    _workload_options(parser.add_argument_group("workload"), corpus)
    group = parser.add_argument_group("runs")
    run_options(group)
    _single_options(group)
    server_options(parser.add_argument_group("servers (the same for all runs)"))
    simulated.add_options(parser.add_argument_group("simulation"))
    return parser


def _workload_options(group: Any, corpus: Path) -> None:
    add = group.add_argument
    add(
        "--workload",
        type=Path,
        required=True,
        metavar="FILE",
        help="Mooncake JSONL, or a CSV of Azure, BurstGPT or Vidur; " + synthetic.HELP,
    )
    add("--window", type=_pair(float), metavar="START,LEN", help="cut these seconds and re-base them to 0")
    add(
        "--thin",
        type=_number,
        metavar="K",
        help="keep every K-th request (keeps burst durations); default: 1, or as --fit finds",
    )
    add(
        "--rate-scale",
        type=_number,
        metavar="R",
        help="divide all arrival times by R (time stretching); default: 1, or as --fit finds",
    )
    add("--input-scale", type=_number, default=1.0, metavar="F", help="multiply prompt lengths, e.g. 1/16")
    add("--input-clip", type=_pair(int), metavar="LO,HI", help="bounds of prompt lengths, tokens")
    add("--output-scale", type=_number, default=1.0, metavar="F", help="multiply output lengths")
    add("--output-clip", type=_pair(int), metavar="LO,HI", help="bounds of output lengths, tokens")
    add("--num-requests", type=int, metavar="N", help="stop after the first N requests")
    add("--save-workload", type=Path, metavar="FILE", help="write what is replayed as Mooncake JSONL")
    prompt_options(group, corpus)


def prompt_options(group: Any, corpus: Path) -> None:
    """Where the text of the requests comes from."""
    add = group.add_argument
    add("--corpus", type=Path, default=corpus, metavar="FILE", help="text that prompts are cut from")
    add("--tokenizer", metavar="DIR", help="default: the model's")
    add("--seed", type=int, default=0, help="of the prompts")


def run_options(group: Any) -> None:
    """Which runs, and what is asked of them."""
    add = group.add_argument
    add(
        "--compare",
        type=_names,
        default=(STOCK,),
        metavar="RUNS",
        help="comma-separated: stock, morphserve, static_FORMAT (static_w8: all layers always in w8), --policy names",
    )
    add(
        "--config",
        type=Path,
        metavar="YAML",
        help="MorphServe config of the morphserve run and the static anchors",
    )
    add(
        "--policy",
        type=_named_file,
        action="append",
        default=[],
        metavar="NAME=YAML",
        help="one more MorphServe config, a run by that name in --compare; repeatable",
    )
    add("--out", type=Path, metavar="DIR", help="where the report goes")
    add("--repeats", type=int, default=1, help="interleaved; the summary gives medians and the spread")
    add("--slo-ttft-s", type=float, help="limit of the time to first token; default: 2")
    add("--slo-tpot-ms", type=float, help="limit of the time per output token; default: 150")
    add("--cutoff", type=float, metavar="S",
        help="end a run this long after its last arrival; default: 120, with --fit by the machine")  # fmt: skip
    add("--request-timeout", type=float, default=300.0, metavar="S", help="give up on one request after this")
    add("--poll", type=float, default=0.5, metavar="S", help="beat of the /metrics poll")
    add("--token-ids", action="store_true", help="record the ids of the generated tokens (vLLM servers only)")
    add("--quiet", action="store_true", help="no progress display")


def _single_options(group: Any) -> None:
    add = group.add_argument
    add("--url", help="measure this server instead of starting any")
    add(
        "--fit",
        action="store_true",
        help="measure a stock server first, and set what is not given of --slo-ttft-s, --slo-tpot-ms and of --thin and "
        "--rate-scale to what means on this machine what the defaults mean on the one of docs/results/step_times.json",
    )
    add("--name", default="server", help="what to call the server of --url")
    add("--dry-run", action="store_true", help="read, check and describe the workload, then stop")


def server_options(group: Any) -> None:
    """The servers of a comparison."""
    add = group.add_argument
    add("--model", metavar="DIR", help="model to serve, and whose tokenizer makes the prompts")
    add("--served-model-name", default="demo", help="name in the API")
    add("--max-model-len", type=int, default=512)
    add("--max-num-seqs", type=int, default=64)
    add("--block-size", type=int, default=32, help="tokens per KV block")
    add("--num-blocks", type=int, default=49, help="KV blocks at full precision, null block included")
    add_dtype_option(group)
    add(
        "--enforce-eager",
        action="store_true",
        help="no torch.compile: starts faster, runs slower, in all runs",
    )
    add("--prefix-caching", action="store_true", help="on in all runs")
    add("--cpu-bind", default="0", metavar="CORES", help="cores of the engine (VLLM_CPU_OMP_THREADS_BIND)")
    add("--start-timeout", type=float, default=600.0, metavar="S")
    add(
        "--serve-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="one more argument of vllm serve; repeatable",
    )


def _number(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as e:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a fraction such as 1/16") from e


def _named_file(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=YAML")
    return name, Path(path)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _pair(kind: type[int] | type[float]) -> Any:
    def parse(text: str) -> tuple[float, float]:
        try:
            low, high = (kind(part) for part in text.split(","))
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"{text!r} is not two numbers with a comma between them") from e
        return low, high

    return parse
