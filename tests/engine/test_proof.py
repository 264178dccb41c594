"""Growth leaves the memory that a worst-case forward pass needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import proof_run
from engine.harness import engine, follow, generate, morph_of, settle

from kv_resize import backing
from morphserve.integration.worker import headroom, worker


@pytest.fixture(scope="module")
def llm(demo_model: Path, variant_cache: Path) -> Iterator[Any]:
    with engine(demo_model, variant_cache, max_num_batched_tokens=proof_run.BATCH_TOKENS) as started:
        yield started


def test_a_full_prefill_takes_no_more_than_was_proven(short_model: Path, tmp_path: Path) -> None:
    """Guards: a figure measured on something smaller than what the scheduler may ask for."""
    done = subprocess.run(
        [sys.executable, proof_run.__file__, str(short_model), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["taken"]) == {"0", "2", "4"}
    for level, taken in found["taken"].items():
        assert proof_run.BATCH_TOKENS * 576 * 2 < taken <= found["proven"], (level, found)


def test_growth_into_that_memory_is_refused(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: blocks are published, and the next long prefill is what the system kills."""
    morph = morph_of(llm)
    block = morph.runtime.kv_block_bytes
    expected = generate(llm, max_tokens=8)
    monkeypatch.setattr(backing, "available_bytes", lambda: morph.worst_forward_bytes + block // 2)
    follow(llm, {0: 6})
    settle(llm, 6)
    assert morph.pool.num_kv_blocks == 49
    assert morph.controller.counters.short_grows > 0
    follow(llm, {0: 0})
    settle(llm, 0)
    llm.reset_prefix_cache()
    assert generate(llm, max_tokens=8) == expected
    assert not morph.status()["errors"]


def test_the_figure_is_kept(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: forward passes at every start, a figure of other conditions, or a damaged file that stops the start."""
    rank = worker.rank().layers
    driver = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    file = rank.directory / "worst_forward.json"
    whole = file.read_text()
    kept = json.loads(whole)[headroom._conditions(driver, rank)]
    assert headroom.known(driver, rank) == kept == morph_of(llm).worst_forward_bytes
    monkeypatch.setattr(driver.vllm_config.scheduler_config, "max_num_batched_tokens", proof_run.BATCH_TOKENS // 2)
    assert headroom.known(driver, rank) is None
    monkeypatch.undo()
    try:
        of_a_former_release = json.dumps({headroom._conditions(driver, rank): {"base": kept}})
        for damaged in ("", "[]", '{"a": 1}', whole[:40], of_a_former_release):
            file.write_text(damaged)
            assert headroom.known(driver, rank) is None
    finally:
        file.write_text(whole)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 30])
def test_every_format_has_a_layer_in_some_pass(num_layers: int) -> None:
    """Guards: the kernel with the largest scratch memory is in no pass, on a stage with few layers or many."""
    mixtures = list(headroom._mixtures(range(10, 10 + num_layers), ("base", "w8", "w4")))
    assert sorted(fmt for mixed in mixtures for fmt in mixed.values()) == ["base", "w4", "w8"]
    assert len(mixtures) == -(-3 // num_layers)
    assert all(layer in range(10, 10 + num_layers) for mixed in mixtures for layer in mixed)
