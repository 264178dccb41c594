"""The short half of `morphserve chaos`: a real server, streaming clients, and what is done to them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from morphserve.cpu_tier import best_dtype
from morphserve.tools.chaos.judge import Seen, judge
from morphserve.tools.chaos.run import ChaosServer, Runner
from morphserve.tools.chaos.scenarios import SCENARIOS, Scenario

pytestmark = pytest.mark.engine


def test_what_must_hold_holds(demo_model: Path, variant_cache: Path, tmp_path: Path) -> None:
    """Guards: a request that is lost or cut, a canary with other tokens at level 0, a server that stays degraded or
    leaves processes, when clients go away in a transition, or a rank stands still in one."""
    server = ChaosServer(
        model=str(demo_model), dtype=best_dtype(), enforce_eager=True, num_blocks=49, max_model_len=512,
        max_num_seqs=24, prefix_caching=True,
    )  # fmt: skip
    runner = Runner(server, tmp_path, {"cache_dir": str(variant_cache)}, num_swings=1)

    async def run() -> tuple[dict[int, tuple[int, ...]], list[tuple[Scenario, Seen]]]:
        known = await runner.reference()
        return known, [result async for result in runner.run([each for each in SCENARIOS if each.is_short])]

    reference, results = asyncio.run(run())
    assert len(results) == 2
    answers = [a for _, seen in results for a in seen.traffic.canaries if a.levels == {0} and a.prompt in reference]
    assert {scenario.name: judge(scenario, seen, reference) for scenario, seen in results} == {
        scenario.name: [] for scenario, _ in results
    }
    assert answers and all(sum((seen.status or {})["transitions"].values()) > 0 for _, seen in results)
