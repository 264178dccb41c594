"""Level 0 is stock vLLM, whatever happened before, and every planted fault shows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from engine import rank_probe
from engine.harness import PROMPTS, engine, follow, generate, kv_script, morph_of, settle, stock_later

# Long enough for several blocks, with a common first block: prefix hits happen, also on moved blocks.
LONG = tuple("The following is the record of a meeting about the library. " * 8 + p for p in PROMPTS)
RESIZES = {3: 191, 9: 38, 14: 120, 18: 22, 20: 30, 27: 49, 33: 244, 36: 40, 40: 28, 43: 24, 46: 60}


@pytest.fixture(scope="module")
def asked(demo_model: Path) -> Future[Any]:
    """Short prompts, long ones, and the long ones again (prefix hits), for stock vLLM while our engine starts."""
    return stock_later(demo_model, [PROMPTS, LONG, LONG])


@pytest.fixture(scope="module")
def llm(demo_model: Path, variant_cache: Path, asked: Future[Any]) -> Iterator[Any]:
    with engine(demo_model, variant_cache) as started:
        yield started


@pytest.fixture(scope="module")
def stock_rounds(asked: Future[Any], llm: Any) -> list[Any]:
    return list(asked.result())


@pytest.fixture(autouse=True)
def level_zero(llm: Any) -> Iterator[None]:
    """Every test starts and ends idle at level 0 with an empty prefix cache."""
    llm.reset_prefix_cache()
    yield
    follow(llm, {0: 0})
    settle(llm, 0)
    assert not morph_of(llm).controller.failed


def hits(llm: Any) -> int:
    """Prefix-cache hits in tokens since start."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.prefix_cache_stats.hits


def test_level_zero_is_stock(llm: Any, stock_rounds: list[Any]) -> None:
    """Guards rule 3: the plugin changes tokens or logprobs although nothing morphs."""
    assert generate(llm) == stock_rounds[0]


def test_restored_is_stock(llm: Any, stock_rounds: list[Any]) -> None:
    """Guards restore: weights that come back are not byte-identical, or a swap that never took effect."""
    for level in (6, 12):
        follow(llm, {0: level})
        settle(llm, level)
        swapped = generate(llm)
        assert all(got != want for got, want in zip(swapped, stock_rounds[0], strict=True))
        follow(llm, {0: 0})
        settle(llm, 0)
        llm.reset_prefix_cache()
        assert generate(llm) == stock_rounds[0]


def test_resizing_is_invisible(llm: Any, stock_rounds: list[Any]) -> None:
    """Guards rules 1, 2 and 5: a token from the wrong block across grows and migrating shrinks."""
    with kv_script(llm, RESIZES) as driver:
        assert generate(llm, LONG) == stock_rounds[1]
        assert driver.num_copied > 0, "no live block was moved: the test would not see a lost one"
    with kv_script(llm, RESIZES) as driver:
        assert generate(llm, LONG) == stock_rounds[2]
        assert driver.num_copied > 0


@pytest.mark.parametrize("fault", ["copy", "rewrite_block_tables"])
def test_planted_fault_is_seen(
    llm: Any, stock_rounds: list[Any], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Guards the test above: without the KV copy, or without the table rewrite, tokens must differ."""
    from morphserve.integration.worker.kv import RankKV

    monkeypatch.setattr(RankKV, fault, lambda *args, **kwargs: None)
    with kv_script(llm, RESIZES) as driver:
        assert generate(llm, LONG) != stock_rounds[1]
        assert driver.num_copied > 0
    monkeypatch.undo()
    llm.reset_prefix_cache()


def test_degraded_kv_is_never_reused_at_level_zero(llm: Any, stock_rounds: list[Any]) -> None:
    """Guards provenance: a level-0 request takes a prefix block that a quantized layer wrote."""
    follow(llm, {0: 6})
    settle(llm, 6)
    assert generate(llm, LONG) != stock_rounds[1]
    follow(llm, {0: 0})
    settle(llm, 0)
    assert generate(llm, LONG) == stock_rounds[1]


def test_history_decides_tokens(llm: Any) -> None:
    """Guards rule 5: the same script of swaps under live requests gives the same tokens, twice."""
    script = {0: 0, 6: 3, 12: 9, 20: 1, 28: 0}
    runs = []
    for _ in range(2):
        llm.reset_prefix_cache()
        follow(llm, script)
        runs.append(generate(llm, LONG))
        follow(llm, {0: 0})
        settle(llm, 0)
    assert runs[0] == runs[1]


def test_tokens_before_a_swap_are_stock(llm: Any, stock_rounds: list[Any]) -> None:
    """Guards token-level morphing: a swap in mid-request must not touch what came before it."""
    follow(llm, {0: 0, 20: 6})
    swapped = generate(llm, LONG)
    for (tokens, probs), (stock_tokens, stock_probs) in zip(swapped, stock_rounds[1], strict=True):
        assert tokens[:15] == stock_tokens[:15] and probs[:15] == stock_probs[:15]
        assert probs != stock_probs


def test_restored_without_the_cache_is_stock(llm: Any, stock_rounds: list[Any]) -> None:
    """Guards: somebody cleans ~/.cache while the server runs, and no level can be left any more."""
    store = rank_probe.store_of()
    put_away = store.directory.rename(store.directory.with_suffix(".away"))
    try:
        for level in (6, 12, 0):
            follow(llm, {0: level})
            settle(llm, level)
    finally:
        put_away.rename(store.directory)
    assert generate(llm) == stock_rounds[0]
