"""Resident memory is what the ledger says, after each transition and in the middle of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.harness import engine, follow, generate, morph_of, settle

from morphserve.integration import rank_layers
from morphserve.integration.host_memory import FREED_WEIGHTS_RETURN, resident_bytes
from morphserve.integration.rank_kv import RankKV
from quant_layers import LayerSwapper, VariantStore, trim

pytestmark = pytest.mark.skipif(not FREED_WEIGHTS_RETURN, reason="not glibc's allocator")

LEVELS = (6, 12, 6, 0)
# What is not ours: the interpreter's and oneDNN's own heap, which creeps by some pages with every chunk.
HEAP_NOISE_BYTES = 8 << 20


@pytest.fixture(scope="module")
def llm(demo_model: Path, variant_cache: Path) -> Iterator[Any]:
    with engine(demo_model, variant_cache) as started:
        generate(started)  # the serving path has taken what it takes
        yield started


def anonymous() -> int:
    return resident_bytes()["anonymous"]


def go(llm: Any, level: int) -> dict[str, int]:
    """The ledger's snapshot at `level`."""
    follow(llm, {0: level})
    settle(llm, level)
    return morph_of(llm).controller.status()["ledger"]


def test_resident_memory_follows_the_ledger(llm: Any) -> None:
    """Guards: freed weights stay in the heap, or KV given back stays resident."""
    trim()  # what loading left in the heap is not ours to count
    start = anonymous()
    at_zero = go(llm, 0)
    total = at_zero["weights_bytes"] + at_zero["kv_blocks_bytes"]
    for level in LEVELS * 3:
        ledger = go(llm, level)
        expected = ledger["weights_bytes"] + ledger["kv_blocks_bytes"] - total
        found = anonymous() - start
        assert abs(found - expected) <= 0.10 * total, (level, found, expected)
        memory = morph_of(llm).executor._executor.collective_rpc("morphserve_memory")[0]
        assert memory["weight_bytes"] == ledger["weights_bytes"]
        assert memory["kv_resident_bytes"] == memory["kv_mapped_bytes"] == ledger["kv_blocks_bytes"]
        assert memory["staging_bytes"] == ledger["staging_bytes"] == 0


def test_never_above_the_budget_in_between(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards rule 4: a transition takes both sides at once, KV before the weights that pay for it.

    Looks after everything a rank does that takes or gives memory. One file is read whole before it is packed
    linear by linear, so one layer's stored tensors come on top of the budget.
    """
    peak = [0]

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            peak[0] = max(peak[0], anonymous())
            return result

        monkeypatch.setattr(owner, name, watched)

    for owner, name in (
        (VariantStore, "read"),
        (rank_layers, "dispatch_cpu_unquantized_gemm"),
        (LayerSwapper, "_build_layer"),
        (LayerSwapper, "commit"),
        (RankKV, "map"),
        (RankKV, "unmap"),
    ):
        watch(owner, name)
    ledger, start = go(llm, 0), anonymous()
    room = ledger["budget_bytes"] - ledger["weights_bytes"] - ledger["kv_blocks_bytes"]
    one_layer = max(max(sizes) for sizes in morph_of(llm).runtime.layer_bytes.values())
    for level in LEVELS:
        go(llm, level)
    assert start < peak[0] <= start + room + one_layer + HEAP_NOISE_BYTES


def test_cycles_do_not_grow(llm: Any) -> None:
    """Guards: every transition leaks a little, and the server dies after a day of bursts."""
    for level in LEVELS:
        go(llm, level)
    start = anonymous()
    for _ in range(20):
        go(llm, 12)
        go(llm, 0)
    assert anonymous() - start <= HEAP_NOISE_BYTES
