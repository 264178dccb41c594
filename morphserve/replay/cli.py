"""Command line of `scripts/replay.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morphserve.errors import MorphServeError
from morphserve.replay import simulated
from morphserve.replay.client import ClientOptions
from morphserve.replay.command import run_command
from morphserve.replay.compare import Comparison, measure_url, run_all
from morphserve.replay.console import ConsoleProgress
from morphserve.replay.errors import ReplayError
from morphserve.replay.limits import check_times
from morphserve.replay.measure import Measurement
from morphserve.replay.metrics import Slo
from morphserve.replay.options import build_parser
from morphserve.replay.prompts import PromptMaker, load_encoder, read_corpus
from morphserve.replay.server import ServerOptions
from morphserve.replay.summary import summarize
from morphserve.replay.workload import Workload, WorkloadSpec, check_fits, load_workload, save_workload


def main(description: str, corpus: Path, argv: Sequence[str] | None = None) -> int:
    """Run the command line; the last line on stdout is one JSON document."""
    args = build_parser(description, corpus).parse_args(argv)
    return run_command("replay", lambda: _replay(args), "servers stopped, finished runs are kept")


def _replay(args: argparse.Namespace) -> dict[str, Any]:
    workload = load_workload(_spec(args))
    check_fits(workload, args.max_model_len)
    if args.save_workload is not None:
        save_workload(workload, args.save_workload)
    if args.dry_run:
        return _description(workload, args.workload)
    simulated.check_options(args)
    if not args.simulate and (args.out is None or (args.tokenizer or args.model) is None):
        raise MorphServeError("--out DIR and --model DIR (or, with --url, --tokenizer DIR) are needed to replay.")
    if not args.simulate and args.url is None and args.model is None:
        raise MorphServeError("--model DIR is needed to start servers; or give --url of a running one.")
    comparison = comparison_of(args, str(args.workload), workload, with_text=not args.simulate)
    comparison.check(is_simulated=args.simulate)
    with ConsoleProgress(enabled=not args.quiet) as progress:
        if args.simulate:
            results = simulated.run_all(comparison, args, progress)
        elif args.url is not None:
            results = measure_url(comparison, args.name, args.url.rstrip("/"), progress)
        else:
            results = run_all(comparison, progress)
    from morphserve.replay.report import write_report  # matplotlib: not before it is needed

    summary = summarize(workload, str(args.workload), comparison.measurement.slo, results)
    page = write_report(summary, results, args.out)
    sys.stderr.write(f"{summary.headline}\n{page}\n")
    return summary.document(str(page))


def _spec(args: argparse.Namespace) -> WorkloadSpec:
    return WorkloadSpec(
        path=args.workload,
        window_s=args.window,
        thin=args.thin,
        rate_scale=args.rate_scale,
        input_scale=args.input_scale,
        input_clip=args.input_clip,
        output_scale=args.output_scale,
        output_clip=args.output_clip,
        limit=args.num_requests,
        seed=args.seed,
    )


def comparison_of(args: argparse.Namespace, source: str, workload: Workload, with_text: bool = True) -> Comparison:
    """What the options ask for, on one workload that was read from `source`.

    Args:
        with_text: make prompts; a simulation reads nothing but their lengths.

    Raises:
        ReplayError: a policy's name is given twice, or a time is none.
        WorkloadError: the corpus or the tokenizer cannot be read.
    """
    check_times(args)
    tokenizer = args.tokenizer or args.model
    prompts: list[list[int]] = []
    if with_text:
        prompts = PromptMaker(read_corpus(args.corpus), load_encoder(tokenizer), args.seed).make(workload)
    return Comparison(
        names=args.compare,
        server=ServerOptions(
            model=args.model or "",
            served_model_name=args.served_model_name,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            block_size=args.block_size,
            num_blocks=args.num_blocks,
            enforce_eager=args.enforce_eager,
            prefix_caching=args.prefix_caching,
            cpu_bind=args.cpu_bind,
            start_timeout_s=args.start_timeout,
            extra_args=tuple(args.serve_arg),
        ),
        measurement=Measurement(
            workload=workload,
            prompts=prompts,
            slo=Slo(args.slo_ttft_s, args.slo_tpot_ms / 1000.0),
            client=ClientOptions(
                url="",
                model=args.served_model_name,
                request_timeout_s=args.request_timeout,
                cutoff_s=args.cutoff,
                token_ids=args.token_ids,
            ),
            poll_s=args.poll,
        ),
        out=args.out,
        config=args.config,
        policies=_unique(args.policy),
        repeats=args.repeats,
        setup={
            "model": args.model,
            "tokenizer": tokenizer,
            "workload": source,
            "seed": args.seed,
            "enforce_eager": args.enforce_eager,
        },
    )


def _unique(policies: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    named = dict(policies)
    if len(named) < len(policies):
        raise ReplayError(f"--policy {', '.join(name for name, _ in policies)}: give each name once.")
    return named


def _description(workload: Workload, path: Path) -> dict[str, Any]:
    return {
        "workload": str(path),
        "requests": len(workload.requests),
        "span_s": workload.span_s,
        "input_tokens": workload.input_tokens,
        "output_tokens": workload.output_tokens,
        "longest_tokens": max(r.input_tokens + r.output_tokens for r in workload.requests),
    }
