"""Options of `morphserve replay`, and those of them that `morphserve sweep` has, too."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from morphserve.serve_dtype import add_dtype_option
from morphserve.shipped import TEXT, text_file
from morphserve.tools.bench import clairvoyant, simulated
from morphserve.tools.bench.comparison import Comparison
from morphserve.tools.bench.load.client import ClientOptions
from morphserve.tools.bench.load.measure import Measurement
from morphserve.tools.bench.load.server import LEFT_TO_VLLM, ServerOptions
from morphserve.tools.command import command_parser
from morphserve.tools.options import add_options
from morphserve.tools.workload import WorkloadSpec


def build_parser(description: str | None, prog: str) -> argparse.ArgumentParser:
    """Return the parser of all options."""
    parser = command_parser(description, prog)
    group = parser.add_argument_group("workload")
    add_options(group, WorkloadSpec, skip=["seed"])
    group.add_argument("--save-workload", type=Path, metavar="FILE", help="write what is replayed as Mooncake JSONL")
    prompt_options(group)
    group = parser.add_argument_group("runs")
    run_options(group)
    _single_options(group)
    server_options(parser.add_argument_group("servers (the same for all runs)"))
    group = parser.add_argument_group("simulation")
    simulated.simulation_options(group)
    clairvoyant.clairvoyant_options(group)
    return parser


def prompt_options(group: Any) -> None:
    """Add where the text of the requests comes from."""
    group.add_argument("--corpus", type=text_file, default=TEXT, metavar="FILE", help="text that prompts are cut from")
    group.add_argument("--tokenizer", metavar="DIR", help="default: the model's")
    add_options(group, WorkloadSpec, only=["seed"])


def run_options(group: Any) -> None:
    """Add which runs, and what is asked of them."""
    add_options(group, Comparison)
    group.add_argument("--slo-ttft-s", type=float, help="limit of the time to first token; default: 2")
    group.add_argument("--slo-tpot-ms", type=float, help="limit of the time per output token; default: 150")
    add_options(group, ClientOptions)
    add_options(group, Measurement)
    group.add_argument("--quiet", action="store_true", help="no progress display")


def _single_options(group: Any) -> None:
    add = group.add_argument
    add("--url", help="measure this server instead of starting any")
    add(
        "--fit",
        action="store_true",
        help="measure a stock server first, and set what is not given of --slo-ttft-s, --slo-tpot-ms and of --thin and "
        "--rate-scale to what means on this machine what the defaults mean on two vCPUs with VNNI, for which they are",
    )
    add("--name", default="server", help="what to call the server of --url")
    add("--dry-run", action="store_true", help="read, check and describe the workload, then stop")


def server_options(group: Any) -> None:
    """Add the settings of all servers of a comparison."""
    add_options(group, ServerOptions, skip=LEFT_TO_VLLM)
    add_dtype_option(group)
