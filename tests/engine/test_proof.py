"""Growth leaves the memory that a worst-case forward pass needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.harness import engine, follow, generate, morph_of, settle
from vllm import SamplingParams

from kv_resize import backing
from morphserve.integration import rank_proof, worker
from morphserve.integration.host_memory import peak_beyond_now

BATCH_TOKENS = 2048


@pytest.fixture(scope="module")
def llm(demo_model: Path, variant_cache: Path) -> Iterator[Any]:
    with engine(demo_model, variant_cache, max_num_batched_tokens=BATCH_TOKENS) as started:
        yield started


def test_a_full_prefill_takes_no_more_than_was_proven(llm: Any) -> None:
    """Guards: a figure measured on something smaller than what the scheduler may ask for."""
    proven = morph_of(llm).worst_forward_bytes
    assert proven > BATCH_TOKENS * 576 * 2  # at least one hidden state per token
    params = SamplingParams(temperature=0.0, max_tokens=1)
    prompts = [{"prompt_token_ids": [100 + 7 * i + k for k in range(500)]} for i in range(8)]
    for level in (0, 6, 12):
        follow(llm, {0: level})
        settle(llm, level)
        llm.reset_prefix_cache()
        llm.generate(prompts, params, use_tqdm=False)  # what is allocated once and stays is no forward pass's
        llm.reset_prefix_cache()
        taken = peak_beyond_now(lambda: llm.generate(prompts, params, use_tqdm=False))
        assert taken <= proven, (level, taken, proven)
    follow(llm, {0: 0})
    settle(llm, 0)


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
    rank = worker.rank_layers()
    driver = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    file = rank.store.directory / "worst_forward.json"
    whole = file.read_text()
    sizes = json.loads(whole)[rank_proof._conditions(driver, rank)]
    assert set(sizes) == {"base", "w8", "w4"}
    assert rank_proof.known(driver, rank) == max(sizes.values()) == morph_of(llm).worst_forward_bytes
    monkeypatch.setattr(driver.vllm_config.scheduler_config, "max_num_batched_tokens", BATCH_TOKENS // 2)
    assert rank_proof.known(driver, rank) is None
    monkeypatch.undo()
    try:
        for damaged in ("", "[]", '{"a": 1}', whole[:40]):
            file.write_text(damaged)
            assert rank_proof.known(driver, rank) is None
    finally:
        file.write_text(whole)
