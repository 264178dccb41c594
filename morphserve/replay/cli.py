"""Command line of `scripts/replay.py`."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from morphserve.errors import MorphServeError
from morphserve.replay.client import ClientOptions
from morphserve.replay.compare import STOCK, Comparison, measure_url, run_all
from morphserve.replay.console import ConsoleProgress
from morphserve.replay.measure import Measurement
from morphserve.replay.metrics import Slo
from morphserve.replay.prompts import PromptMaker, load_encoder, read_corpus
from morphserve.replay.server import ServerOptions
from morphserve.replay.summary import summarize
from morphserve.replay.workload import Workload, WorkloadSpec, check_fits, load_workload, save_workload


def build_parser(description: str, corpus: Path) -> argparse.ArgumentParser:
    """All options; `corpus` is the default text for prompts."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    _workload_options(parser.add_argument_group("workload"), corpus)
    _run_options(parser.add_argument_group("runs"))
    _server_options(parser.add_argument_group("servers (the same for all runs)"))
    return parser


def _workload_options(group: Any, corpus: Path) -> None:
    add = group.add_argument
    add(
        "--workload",
        type=Path,
        required=True,
        metavar="FILE",
        help="Mooncake JSONL, or a CSV of Azure, BurstGPT or Vidur",
    )
    add("--window", type=_pair(float), metavar="START,LEN", help="cut these seconds and re-base them to 0")
    add(
        "--thin",
        type=_number,
        default=1.0,
        metavar="K",
        help="keep every K-th request (keeps burst durations)",
    )
    add(
        "--rate-scale",
        type=_number,
        default=1.0,
        metavar="R",
        help="divide all arrival times by R (time stretching)",
    )
    add("--input-scale", type=_number, default=1.0, metavar="F", help="multiply prompt lengths, e.g. 1/16")
    add("--input-clip", type=_pair(int), metavar="LO,HI", help="bounds of prompt lengths, tokens")
    add("--output-scale", type=_number, default=1.0, metavar="F", help="multiply output lengths")
    add("--output-clip", type=_pair(int), metavar="LO,HI", help="bounds of output lengths, tokens")
    add("--num-requests", type=int, metavar="N", help="stop after the first N requests")
    add("--save-workload", type=Path, metavar="FILE", help="write what is replayed as Mooncake JSONL")
    add("--corpus", type=Path, default=corpus, metavar="FILE", help="text that prompts are cut from")
    add("--tokenizer", metavar="DIR", help="default: the model's")
    add("--seed", type=int, default=0, help="of the prompts")


def _run_options(group: Any) -> None:
    add = group.add_argument
    add(
        "--compare",
        type=_names,
        default=(STOCK,),
        metavar="RUNS",
        help="comma-separated: stock, morphserve, static_FORMAT (static_w8: all layers always in w8)",
    )
    add(
        "--config",
        type=Path,
        metavar="YAML",
        help="MorphServe config of the morphserve run and the static anchors",
    )
    add("--out", type=Path, metavar="DIR", help="where the report goes")
    add("--url", help="measure this server instead of starting any")
    add("--name", default="server", help="what to call the server of --url")
    add("--repeats", type=int, default=1, help="interleaved; the summary gives medians and the spread")
    add("--slo-ttft-s", type=float, default=2.0, help="limit of the time to first token")
    add("--slo-tpot-ms", type=float, default=150.0, help="limit of the time per output token")
    add("--cutoff", type=float, default=120.0, metavar="S", help="end a run this long after its last arrival")
    add("--request-timeout", type=float, default=300.0, metavar="S", help="give up on one request after this")
    add("--poll", type=float, default=0.5, metavar="S", help="beat of the /metrics poll")
    add("--token-ids", action="store_true", help="record the ids of the generated tokens (vLLM servers only)")
    add("--dry-run", action="store_true", help="read, check and describe the workload, then stop")
    add("--quiet", action="store_true", help="no progress display")


def _server_options(group: Any) -> None:
    add = group.add_argument
    add("--model", metavar="DIR", help="model to serve, and whose tokenizer makes the prompts")
    add("--served-model-name", default="demo", help="name in the API")
    add("--max-model-len", type=int, default=512)
    add("--max-num-seqs", type=int, default=64)
    add("--block-size", type=int, default=32, help="tokens per KV block")
    add("--num-blocks", type=int, default=49, help="KV blocks at full precision, null block included")
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


def main(description: str, corpus: Path, argv: Sequence[str] | None = None) -> int:
    """Run the command line; the last line on stdout is one JSON document."""
    args = build_parser(description, corpus).parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _terminated)  # so that servers are stopped as on Ctrl-C
    try:
        document = _replay(args)
    except MorphServeError as e:
        sys.stderr.write(f"replay: {e}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("replay: interrupted; servers stopped, finished runs are kept\n")
        return 130
    sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")
    return 0


def _terminated(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _replay(args: argparse.Namespace) -> dict[str, Any]:
    workload = load_workload(_spec(args))
    check_fits(workload, args.max_model_len)
    if args.save_workload is not None:
        save_workload(workload, args.save_workload)
    if args.dry_run:
        return _description(workload, args.workload)
    if args.out is None or (args.tokenizer or args.model) is None:
        raise MorphServeError(
            "--out DIR and --model DIR (or, with --url, --tokenizer DIR) are needed to replay."
        )
    if args.url is None and args.model is None:
        raise MorphServeError("--model DIR is needed to start servers; or give --url of a running one.")
    comparison = _comparison(args, workload)
    comparison.check()
    with ConsoleProgress(enabled=not args.quiet) as progress:
        if args.url is not None:
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


def _comparison(args: argparse.Namespace, workload: Workload) -> Comparison:
    tokenizer = args.tokenizer or args.model
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
        repeats=args.repeats,
        setup={
            "model": args.model,
            "tokenizer": tokenizer,
            "workload": str(args.workload),
            "seed": args.seed,
            "enforce_eager": args.enforce_eager,
        },
    )


def _description(workload: Workload, path: Path) -> dict[str, Any]:
    return {
        "workload": str(path),
        "requests": len(workload.requests),
        "span_s": workload.span_s,
        "input_tokens": workload.input_tokens,
        "output_tokens": workload.output_tokens,
        "longest_tokens": max(r.input_tokens + r.output_tokens for r in workload.requests),
    }


def _number(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as e:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a fraction such as 1/16") from e


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
