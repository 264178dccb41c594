"""What becomes of users' answers when something breaks beside them?

Starts real servers of MODEL with the plugin, sends a square wave of streaming requests and two canaries whose tokens a
stock server has shown before, and breaks something from outside: processes are stopped and killed, files cut and
removed, disks slow, full and away, limits lowered, system calls refused, clocks set; clients go away or ask for the
impossible, operators pause and drain. After each the server must have answered every request in full (or refused it
with 503), its canaries as stock does, and be back at level 0 within 30 s, with ledgers that hold, at most the warnings
that the scenario allows (one a fault) and no process left over. About 40 seconds a scenario, and as much for each
server. Scenarios of two ranks need a model whose attention heads are divisible by two; others leave them out.

Output columns: scenario, holds or what does not, requests answered, canaries at level 0, transitions, seconds until
level 0.
Last stdout line: one JSON document. The exit status is 1 if anything does not hold.

    morphserve chaos MODEL_DIR
    morphserve chaos MODEL_DIR --scenario frozen-rank --scenario hangup --kind slo
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morphserve.hub import find_files
from morphserve.tools.chaos.judge import Seen, figures, judge
from morphserve.tools.chaos.report import report
from morphserve.tools.chaos.run import POLICIES, ChaosServer, Runner
from morphserve.tools.chaos.scenarios import SCENARIOS, Scenario
from morphserve.tools.command import command_parser, run_command, say
from morphserve.tools.machine import describe_machine


def main(argv: Sequence[str] | None = None, prog: str = "morphserve chaos") -> int:
    """Break things; returns the exit status."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("model")
    parser.add_argument("--scenario", action="append", choices=[each.name for each in SCENARIOS], help="default: all")
    parser.add_argument("--short", action="store_true", help="only those that take little time and share a server")
    parser.add_argument("--kind", choices=tuple(POLICIES), default="threshold", help="of the policy")
    parser.add_argument("--dtype", help="as of vllm serve; default: the model's own")
    parser.add_argument("--out", type=Path, help="directory for logs, settings and report.md; default: a temporary one")
    parser.add_argument("--serve-arg", action="append", default=[], metavar="ARG", help="one more, of vllm serve")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}

    def job() -> dict[str, Any]:
        args.model = str(find_files(args.model, "model"))
        directory = args.out or Path(tempfile.mkdtemp(prefix="morphserve-chaos-"))
        directory.mkdir(parents=True, exist_ok=True)
        say(f"logs: {directory}")
        found.update(asyncio.run(_run(args, directory.resolve())))
        return found

    code = run_command(prog, job, "nothing is kept but the logs")
    return code or int(any(each["violations"] for each in found["scenarios"]))


async def _run(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    server = ChaosServer(
        model=args.model, dtype=args.dtype, enforce_eager=True, num_blocks=49, max_model_len=512, max_num_seqs=24,
        extra_args=tuple(args.serve_arg), prefix_caching=True,
        cpu_bind=os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "0"),
    )  # fmt: skip
    wanted = [
        each
        for each in SCENARIOS
        if (not args.scenario or each.name in args.scenario) and (each.is_short or not args.short)
    ]
    runner = Runner(server, directory, kind=args.kind)
    skipped = _unfit(wanted, Path(args.model))
    for name, why in skipped.items():
        say(f"{name}  skipped: {why}")
    wanted = [each for each in wanted if each.name not in skipped]
    references = {_as_stock(each): await runner.reference(each) for each in {_as_stock(e): e for e in wanted}.values()}
    for (serve_args, num_ranks), reference in references.items():
        say(f"canaries that a stock server is sure of ({num_ranks} ranks, {serve_args}): {sorted(reference)}")
    rows: list[dict[str, Any]] = []
    found = {"machine": describe_machine(), "model": Path(args.model).name, "scenarios": rows, "skipped": skipped}
    async for scenario, seen in runner.run(wanted):
        rows.append(_row(scenario, seen, references[_as_stock(scenario)]))
        (directory / "report.md").write_text(report(found), encoding="utf-8")
    return found


def _row(scenario: Scenario, seen: Seen, reference: Mapping[int, tuple[int, ...]]) -> dict[str, Any]:
    """Judge a scenario, and say what came of it."""
    violations = judge(scenario, seen, reference)
    if not reference:
        violations.append("a stock server is sure of no canary, or changes each under load: tokens cannot be judged")
    row = {"name": scenario.name, "question": scenario.question, "violations": violations, **figures(seen)}
    counts = f"{row['answered']}/{row['requests']}  {row['canaries_at_level_0']}/{row['canaries']}"
    verdict = "; ".join(violations) or "holds"
    say(f"{scenario.name}  {verdict}  {counts}  {sum(row['transitions'].values())}  {row['restored_s']}")
    return row


def _as_stock(scenario: Scenario) -> tuple[object, ...]:
    """Return what a stock server must have in common with the scenario's."""
    return scenario.serve_args, scenario.num_ranks


def _unfit(scenarios: Sequence[Scenario], model: Path) -> dict[str, str]:
    """Return the scenarios that this model cannot be served in, with the reason."""
    heads = json.loads((model / "config.json").read_text(encoding="utf-8")).get("num_attention_heads", 0)
    return {
        each.name: f"{heads} attention heads are not divisible by {each.num_ranks} ranks"
        for each in scenarios
        if heads % each.num_ranks
    }
