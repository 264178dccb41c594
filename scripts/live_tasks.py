"""What do users' answers lose while layers are swapped under them? lm-eval's tasks through live servers, under a load.

One server after the other is started; a trace is replayed against it, over and over, while lm-eval asks its questions
of the same server. Items are held against those of the first run, one by one. A relay in between leaves out the seed
that lm-eval sends (answers are greedy) and asks for receipts, which say at what level each item was computed.

Tasks, of --limit items each, out of files in --data: cloze_wikitext and cloze_qmsum (the last word of a passage; of
wikitext2/test.txt and qmsum/test.jsonl), gsm8k_solution (a written solution, given the question; of gsm8k/test.jsonl)
and gsm8k_answer (the last number of a generated one, two examples before it, --answers items).

Output columns: run, task, items, score (as lm-eval says: acc or exact_match), ppl (of a target's token), difference
(run minus first run, log probability of targets, nats a token, mean over items), +- (one standard error), lost and won
(items right in the first run and wrong in this one; the other way), below (share of the task's tokens that a level
below full precision computed), served (the same of all that the server generated meanwhile), moves (of the level).
Last stdout line: one JSON document, in it too: other_answer (items with another generated number), at_full_precision
(items that level 0 computed altogether: the most that they differ is rounding), load, doubts (a server that never left
level 0, or was not back a minute after the load; items without a receipt; a load that nobody answered). A task whose
result lies in --out is not asked again.

lm-eval has a place of its own: python -m venv lm && lm/bin/pip install "lm-eval[api]==0.4.13" transformers

    python scripts/live_tasks.py --data DIR --model MODEL_DIR --lm-eval lm/bin/lm_eval --config demo --workload convD \\
        --compare stock,morphserve,static_w8,static_w4 --without-load stock --enforce-eager --out reports/tasks
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from live_items import (
    ANSWER,
    Encode,
    Item,
    compare,
    doubts,
    make_tasks,
    read_answers,
    share_below,
    status_change,
    task_file,
)
from live_traffic import Relay, keep_loaded, run_lm_eval

from morphserve.errors import MorphServeError
from morphserve.files import write_whole
from morphserve.tools.bench import status_of
from morphserve.tools.bench.cli import comparison_of, settle_dtype
from morphserve.tools.bench.comparison import STOCK, Comparison, static_format
from morphserve.tools.bench.load.client import ClientOptions
from morphserve.tools.bench.options import prompt_options, server_options
from morphserve.tools.bench.report.console import ConsoleProgress
from morphserve.tools.bench.servers import start_server
from morphserve.tools.checks import at_least, check_directory
from morphserve.tools.command import command_parser, run_command, say
from morphserve.tools.machine import describe_machine
from morphserve.tools.options import add_options, read_options
from morphserve.tools.tables import text_table
from morphserve.tools.workload import WorkloadSpec, check_fits, load_encoder, load_workload, read_corpus

CORPUS = Path(__file__).resolve().parent / "corpus" / "wikitext2.txt"  # profiles are made on it, unless told otherwise
_PATIENCE_S = 60.0
_HEAD = ("run", "task", "items", "score", "ppl", "difference", "+-", "lost", "won", "below", "served", "moves")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    add = parser.add_argument_group("tasks").add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="with wikitext2, qmsum and gsm8k in it")
    add("--lm-eval", default="lm_eval", metavar="COMMAND", help="default: lm_eval")
    add("--limit", type=at_least(2), default=100, metavar="N", help="items of a task; default: 100")
    add("--answers", type=at_least(2), default=60, metavar="N", help=f"items of {ANSWER}; default: 60")
    add("--concurrent", type=at_least(1), default=4, metavar="N", help="items asked at a time; default: 4")
    add("--task-timeout", type=at_least(1), default=3600, metavar="S", help="give up a task then; default: 3600")
    add("--without-load", default="", metavar="RUNS", help="of --compare, that get nothing but the tasks")
    add("--rest", type=at_least(0), default=20, metavar="S", help="between two replays of the load; default: 20")
    group = parser.add_argument_group("load and runs")
    add_options(group, WorkloadSpec, skip=["seed"])
    prompt_options(group)
    add_options(group, Comparison, skip=["repeats"])
    add_options(group, ClientOptions, only=["request_timeout_s", "cutoff_s", "temperature"])
    server_options(parser.add_argument_group("servers (the same for all runs)"))
    parser.set_defaults(simulate=False, top_logprobs=0, slo_ttft_s=None, slo_tpot_ms=None)
    args = parser.parse_args(argv)
    if args.model is None or args.out is None:
        parser.error("--model DIR and --out DIR are needed")
    return run_command("live_tasks", lambda: _measure(args), "servers stopped, finished tasks are kept")


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    if (lm_eval := shutil.which(args.lm_eval)) is None:
        raise MorphServeError(
            f"--lm-eval {args.lm_eval}: there is no such command. Install it anywhere, pip install "
            '"lm-eval[api]==0.4.13" transformers, and give --lm-eval DIR/bin/lm_eval.'
        )
    check_directory(args.out, "--out")
    idle = {name for name in args.without_load.split(",") if name}
    if unknown := sorted(idle.difference(args.compare)):
        raise MorphServeError(f"--without-load {','.join(unknown)}: choose from --compare {','.join(args.compare)}.")
    workload = load_workload(read_options(WorkloadSpec, args))
    check_fits(workload, args.max_model_len)
    settle_dtype(args)
    comparison = comparison_of(args, str(args.workload), workload)
    comparison.check()
    tokenizer = args.tokenizer or args.model
    encode = load_encoder(tokenizer)
    known = read_corpus(CORPUS)
    tasks = make_tasks(args.data, encode, args.limit, args.answers, args.max_model_len, known)
    out = args.out.absolute()
    for name in comparison.names:
        load = None if name in idle else [repr(workload), args.rest, args.corpus, args.seed, args.temperature]
        config = comparison.derived(name, out / name)
        client = repr(comparison.measurement.client)
        asked = {"items": tasks, "load": load, "concurrent": args.concurrent, "client": client}
        where = {"server": repr(comparison.server), "config": config, "machine": describe_machine()}
        _keep_to(out / name, asked | where)
    local = Path(tokenizer).absolute()
    tokenizer = str(local) if local.exists() else tokenizer
    command = [
        str(Path(lm_eval).absolute()), "run", "--log_samples", "--model", "local-completions", "--model_args",
        f"model={args.served_model_name},tokenizer={tokenizer},tokenizer_backend=huggingface,"
        f"max_length={args.max_model_len},num_concurrent={args.concurrent},timeout=900",
    ]  # fmt: skip
    with ConsoleProgress() as progress:
        for name in comparison.names:
            missing = {task: items for task, items in tasks.items() if not (out / name / f"{task}.json").is_file()}
            if missing:
                (out / name / "rest.json").unlink(missing_ok=True)
                with start_server(comparison, name, out / name, name, progress) as server:
                    rest_s = None if name in idle else args.rest
                    asyncio.run(_ask_all(comparison, server.url, rest_s, missing, encode, command, out / name, args))
    return _report(out, comparison.names, list(tasks), idle)


def _keep_to(out: Path, setup: dict[str, Any]) -> None:
    """Refuse to add to results of other items or settings."""
    out.mkdir(parents=True, exist_ok=True)
    file, text = out / "setup.json", json.dumps(setup, default=str)
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise MorphServeError(f"--out {out} has results of other items or settings. Give another directory.")
    write_whole(file, text)


async def _ask_all(
    comparison: Comparison, url: str, rest_s: float | None, tasks: Mapping[str, list[Item]], encode: Encode,
    command: Sequence[str], directory: Path, args: argparse.Namespace,
) -> None:  # fmt: skip
    """Ask one task after the other, and write down what came of each; the load goes on until the last one ends."""
    relay, load = Relay(url), Counter[str]()
    what = comparison.measurement
    loading = asyncio.create_task(keep_loaded(what, replace(what.client, url=url), rest_s, load))
    try:
        async with relay.listening() as asked_url:
            for task, items in tasks.items():
                sys.stderr.write(f"{directory.name}: {task}, {len(items)} items\n")
                before, load_before, begin = await _status(url, directory.name), load.copy(), time.monotonic()
                work = directory / "lm_eval" / task
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                lines = "".join(json.dumps(item) + "\n" for item in items)
                (work / "items.jsonl").write_text(lines, encoding="utf-8")
                (work / "task.yaml").write_text(json.dumps(task_file(task, work / "items.jsonl")), encoding="utf-8")
                words = [f"{command[-1]},base_url={asked_url}", "--tasks", task]
                words += ["--include_path", str(work), "--output_path", str(work / "out")]
                await run_lm_eval([*command[:-1], *words], work, args.task_timeout)
                if loading.done():
                    loading.result()
                scores, answered = read_answers(work / "out", task, encode, relay.levels)
                told = {
                    "scores": scores,
                    "served": status_change(before, await _status(url, directory.name)),
                    "load": dict(load - load_before),
                    "took_s": round(time.monotonic() - begin, 1),
                    "items": answered,
                }
                write_whole(directory / f"{task}.json", json.dumps(told))
        loading.cancel()
        write_whole(directory / "rest.json", json.dumps({"level": await _level_at_rest(url, directory.name)}))
    finally:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)


async def _status(url: str, name: str) -> dict[str, Any]:
    """Return what the server of a run says of itself; nothing of a stock one.

    Raises:
        MorphServeError: it does not say.
    """
    status = await status_of(url)
    if status is None and name != STOCK:
        raise MorphServeError(f"{name}: the server says nothing of its level any more. Its log says why. Run again.")
    return status or {}


async def _level_at_rest(url: str, name: str) -> int:
    """Return level 0 as soon as a server without a load is there, or where it is after a minute; 0 of stock."""
    until = time.monotonic() + _PATIENCE_S
    while (level := int((await _status(url, name)).get("level", 0))) and time.monotonic() < until:
        await asyncio.sleep(1.0)
    return level


def _report(out: Path, names: Sequence[str], tasks: Sequence[str], idle: Collection[str]) -> dict[str, Any]:
    read = {name: {t: json.loads((out / name / f"{t}.json").read_text("utf-8")) for t in tasks} for name in names}
    rows, told = [], []
    for name, of_run in read.items():
        for task, found in of_run.items():
            paired = compare(read[names[0]][task]["items"], items := found["items"])
            score = found["scores"].get("exact_match", found["scores"].get("acc"))
            nats = [each["loglik"] for each in items if "loglik" in each]
            ppl = math.exp(-sum(nats) / sum(each["num_tokens"] for each in items)) if nats else None
            served, moves = share_below(found["served"]["tokens_by_level"]), found["served"]["transitions"]
            num_moves = sum(n for key, n in moves.items() if key.endswith("_committed"))
            told.append({"run": name, "task": task, "items": len(items), "token_perplexity": ppl, **paired,
                         **{key: found[key] for key in ("scores", "served", "load", "took_s")}})  # fmt: skip
            figures = ((score, ".3f"), (ppl, ".2f"), (paired["difference"], "+.4f"), (paired["standard_error"], ".4f"))
            shares = (("" if share is None else f"{share:.0%}") for share in (paired["below"], served))
            rows.append((name, task, str(len(items)), *("" if x is None else f"{x:{f}}" for x, f in figures),
                         str(paired["lost"]), str(paired["won"]), *shares, str(num_moves)))  # fmt: skip
    for line in text_table(_HEAD, rows):
        say(line)
    rests = {name: out / name / "rest.json" for name in names}
    levels = {n: json.loads(file.read_text("utf-8"))["level"] if file.is_file() else None for n, file in rests.items()}
    doubted = [d for n in names for d in _doubts_of(n, read[n].values(), levels[n], n in idle)]
    for line in doubted:
        say(line)
    document = {"runs": told, "doubts": doubted}
    write_whole(out / "report.json", json.dumps(document))
    return document


def _doubts_of(name: str, found: Collection[dict[str, Any]], level: int | None, is_idle: bool) -> list[str]:
    """Return what the tasks of a run do not show.

    Args:
        name: of the run.
        found: what was written of each task.
        level: a while after the load; None = stopped before.
        is_idle: it got nothing but the tasks, so that its level need not move.
    """
    said = [] if is_idle and not static_format(name) else doubts(name, [each["served"] for each in found], level)
    if name != STOCK and (num := sum(not item["levels"] for each in found for item in each["items"])):
        said.append(f"{name}: of {num} items nobody knows at which level they were computed.")
    if not is_idle and not any(each["load"].get("ok") for each in found):
        said.append(f"{name}: no request of the load was answered beside the tasks.")
    return said


if __name__ == "__main__":
    sys.exit(main())
