"""How does a burst of real traffic fare on stock vLLM, on MorphServe and on static quantized servers?

Replays a trace open-loop against each server in turn (started here, on the same machine with the same
memory, or given with --url) and writes a report: summary.md, summary.json, report.html, timeline.png, and
per run result.json (a superset of `vllm bench serve --save-result --save-detailed`), requests.csv,
series.csv, server.log.

With --fit a stock server is measured first, for less than a minute. Limits become the multiples of a lone request's
times that 2 s and 150 ms are on a CPU with VNNI; the workload is thinned, or sent faster, until stock would have two in
five requests late even if the machine were a fifth faster. What is given on the command line stays.

What is shipped goes by its bare name, where no such file exists: convD, convE, conv593 (conversation), hybA, hybB, hybC
(bursts) and code557 (code) for --workload; default, demo, accuracy, performance and slo for --config and --policy.

The last line on stdout is one JSON document: {"workload", "slo": {"ttft_s", "tpot_s"}, "dtype", "fit", "runs":
[{"name", "sent", "violation_rate", "ttft_violation_rate", "tpot_violation_rate", "ttft_p50_s", "ttft_p95_s",
"tpot_p50_ms", "tpot_p99_ms", "output_tok_s", "duration_s", "preemptions", "tokens_by_level", "expected_kl_per_token",
"transitions", "level_zero_after_s", "pause_max_ms"}, ...], "report"}; null where a run has no such figure.

Example:
    morphserve replay --workload convD --model MODEL_DIR \\
        --compare stock,morphserve --config default --out reports/convD

    # the same without servers, and one more config beside it
    morphserve replay --workload convD --simulate --step-times times.json \\
        --compare stock,morphserve,mine --config default --policy mine=mine.yaml --out reports/sim

    # cut a workload of one's own out of the Azure trace
    morphserve replay --workload AzureLLMInferenceTrace_conv.csv --window 221,72 --thin 4.75 \\
        --input-scale 1/16 --input-clip 8,120 --output-clip 4,384 --save-workload mine.jsonl --dry-run
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from morphserve.errors import MorphServeError
from morphserve.serve_dtype import AUTO, model_dtype, resolve_dtype
from morphserve.tools.bench import clairvoyant, simulated
from morphserve.tools.bench.comparison import Comparison
from morphserve.tools.bench.fit import Given, fit
from morphserve.tools.bench.fitted import run_fitted
from morphserve.tools.bench.load.client import ClientOptions
from morphserve.tools.bench.load.measure import Measurement
from morphserve.tools.bench.load.probe import StockSpeed, probe
from morphserve.tools.bench.load.scrape import num_kv_blocks
from morphserve.tools.bench.load.server import Server, ServerOptions
from morphserve.tools.bench.options import build_parser
from morphserve.tools.bench.report.console import ConsoleProgress
from morphserve.tools.bench.report.results import RunResult
from morphserve.tools.bench.report.summary import summarize
from morphserve.tools.bench.runner import run_all
from morphserve.tools.bench.servers import GivenServers, StartedServers
from morphserve.tools.checks import check_directory
from morphserve.tools.command import run_command
from morphserve.tools.machine import describe_machine
from morphserve.tools.options import read_options
from morphserve.tools.sim import ServerSpec
from morphserve.tools.workload import (
    PromptMaker,
    ReplayError,
    Slo,
    Workload,
    WorkloadSpec,
    check_fits,
    check_times,
    load_encoder,
    load_workload,
    read_corpus,
    save_workload,
)
from policies import BASE_FORMAT

_VLLM_MAX_LOGPROBS = 20  # that its servers tell unless they are asked for more (--max-logprobs)


def main(argv: Sequence[str] | None = None, prog: str = "morphserve replay", description: str | None = __doc__) -> int:
    """Run the command line; the last line on stdout is one JSON document."""
    args = build_parser(description, prog).parse_args(argv)
    return run_command(prog, lambda: _replay(args), "servers stopped, finished runs are kept")


def _replay(args: argparse.Namespace) -> dict[str, Any]:
    spec = read_options(WorkloadSpec, args)
    workload = load_workload(spec)
    check_fits(workload, args.max_model_len)
    if args.save_workload is not None:
        save_workload(workload, args.save_workload)
    if args.dry_run:
        return _description(workload, args.workload)
    _check(args)
    settle_dtype(args)
    comparison = comparison_of(args, str(args.workload), workload, with_text=not args.simulate)
    comparison.check(is_simulated=args.simulate)
    if args.clairvoyant:
        clairvoyant.searched(args, comparison)  # before any run: what cannot be searched
    with ConsoleProgress(enabled=not args.quiet) as progress:
        comparison, results = _run(args, spec, comparison, progress)
    from morphserve.tools.bench.report.report import write_report  # matplotlib: not before it is needed

    what = comparison.measurement
    summary = summarize(what.workload, str(args.workload), what.slo, results)
    page = write_report(summary, results, args.out)
    sys.stderr.write(f"{summary.headline}\n{page}\n")
    document = summary.document(str(page))
    if args.clairvoyant:
        document["clairvoyant"] = clairvoyant.find_best(args, comparison)
    return document


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be run.

    Raises:
        MorphServeError: an option is missing, or two contradict each other.
    """
    simulated.check_options(args)
    clairvoyant.check_options(args)
    if not args.simulate and (args.out is None or (args.tokenizer or args.model) is None):
        raise MorphServeError("--out DIR and --model DIR (or, with --url, --tokenizer DIR) are needed to replay.")
    if not args.simulate and args.url is None and args.model is None:
        raise MorphServeError("--model DIR is needed to start servers; or give --url of a running one.")
    if args.fit and args.url is not None:
        raise ReplayError("--fit measures a stock server that is started for it. Leave out --fit or --url.")
    check_directory(args.out, "--out")


def _run(
    args: argparse.Namespace, spec: WorkloadSpec, comparison: Comparison, progress: ConsoleProgress
) -> tuple[Comparison, list[RunResult]]:
    """Do all runs where the options say; returns the comparison with what was fitted, too."""
    if args.simulate:
        if args.fit:
            comparison = fit_simulated(args, spec, comparison)
        return comparison, run_all(comparison, simulated.load_engine(args), progress)
    if args.url is not None:
        comparison = replace(comparison, names=(args.name,))
        given = GivenServers({args.name: Server(args.url.rstrip("/"))}, progress)
        return comparison, run_all(comparison, given, progress)
    if args.fit:
        return run_fitted(comparison, partial(fit_url, args, spec, comparison), progress)
    return comparison, run_all(comparison, StartedServers(progress), progress)


def comparison_of(args: argparse.Namespace, source: str, workload: Workload, with_text: bool = True) -> Comparison:
    """Return what the options ask for, on one workload that was read from `source`.

    Args:
        with_text: make prompts; a simulation reads nothing but their lengths.

    Raises:
        ReplayError: a time is none.
        WorkloadError: the corpus or the tokenizer cannot be read.
    """
    check_times(args)
    return read_options(
        Comparison,
        args,
        server=_server_options(args),
        measurement=read_options(
            Measurement,
            args,
            workload=workload,
            prompts=_prompts(args, workload) if with_text else [],
            slo=_slo(args),
            client=read_options(ClientOptions, args, url="", model=args.served_model_name),
        ),
        setup={
            "model": args.model,
            "tokenizer": args.tokenizer or args.model,
            "workload": source,
            "seed": args.seed,
            "temperature": args.temperature,
            "dtype": args.dtype or (model_dtype(args.model) if args.model else None),
            "enforce_eager": args.enforce_eager,
        },
    )


def _server_options(args: argparse.Namespace) -> ServerOptions:
    options = read_options(ServerOptions, args, dtype=args.dtype)
    if args.top_logprobs <= _VLLM_MAX_LOGPROBS:
        return options
    return replace(options, extra_args=(*options.extra_args, f"--max-logprobs={args.top_logprobs}"))


def _prompts(args: argparse.Namespace, workload: Workload) -> list[list[int]]:
    encode = load_encoder(args.tokenizer or args.model)
    return PromptMaker(read_corpus(args.corpus), encode, args.seed).make(workload)


def settle_dtype(args: argparse.Namespace) -> None:
    """Set `args.dtype` to what every server that is started gets; None = nothing.

    Raises:
        ReplayError: it is given where no server is started, or twice.
    """
    starts_none = args.simulate or getattr(args, "url", None) is not None  # a sweep has no --url
    given_to_vllm = any(argument.partition("=")[0] == "--dtype" for argument in args.serve_arg)
    if args.dtype == AUTO:
        args.dtype = None if starts_none or given_to_vllm else resolve_dtype(AUTO, args.model)
    elif starts_none or given_to_vllm:
        what = "no server is started with --simulate and --url" if starts_none else "--serve-arg has a --dtype, too"
        raise ReplayError(f"--dtype {args.dtype}: {what}. Leave one out.")


def fit_url(args: argparse.Namespace, spec: WorkloadSpec, comparison: Comparison, url: str) -> Comparison:
    """Return the comparison with load and limits fitted to the stock server at `url`, which was started for it."""
    what = comparison.measurement
    tokens = [token for prompt in reversed(what.prompts) for token in reversed(prompt)]  # not the prompts themselves
    server = comparison.server
    if not server.num_blocks:
        server = replace(server, num_blocks=num_kv_blocks(url))
    speed = probe(server, replace(what.client, url=url), tokens)
    return _fitted(args, spec, comparison, server, speed, str(describe_machine().get("cpu", "")))


def fit_simulated(args: argparse.Namespace, spec: WorkloadSpec, comparison: Comparison) -> Comparison:
    """Return the same for a simulated server, whose speed is known."""
    times = simulated.load_engine(args).calibration.times
    speed = StockSpeed.calibrated(times.formats[BASE_FORMAT], times.offset_s, args.sim_speed)
    return _fitted(args, spec, comparison, comparison.server, speed, times.machine)


def _fitted(
    args: argparse.Namespace,
    spec: WorkloadSpec,
    comparison: Comparison,
    server: ServerSpec,
    speed: StockSpeed,
    machine: str,
) -> Comparison:
    """Return the comparison with what suits a stock server: `server` with all KV blocks that it has."""
    given = Given(args.thin, args.rate_scale, args.slo_ttft_s, args.slo_tpot_ms, args.cutoff)
    found = fit(spec, given, simulated.sim_server(server, comparison.measurement, step_noise=0.0), speed)
    sentence = found.sentence(machine)
    sys.stderr.write(f"{sentence}\n")
    workload = load_workload(replace(spec, thin=found.thin, rate_scale=found.rate_scale))
    if args.save_workload is not None:
        save_workload(workload, args.save_workload)
    comparison = comparison_of(args, str(args.workload), workload, with_text=bool(comparison.measurement.prompts))
    return replace(
        comparison,
        measurement=replace(
            comparison.measurement,
            slo=found.slo,
            client=replace(comparison.measurement.client, cutoff_s=found.cutoff_s),
        ),
        promise=found.slo,
        setup=comparison.setup | {"fit": found.document() | {"sentence": sentence}},
    )


def _slo(args: argparse.Namespace) -> Slo:
    unset = Slo()
    return Slo(
        unset.ttft_s if args.slo_ttft_s is None else args.slo_ttft_s,
        unset.tpot_s if args.slo_tpot_ms is None else args.slo_tpot_ms / 1000.0,
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
