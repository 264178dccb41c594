"""A mix of requests on one rank, see `oracle`; on several ranks in test_ranks.py and test_pipeline.py.

CYCLES=1000 for the whole of the memory test by hand.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import oracle
from engine.harness import engine, kv_script, morph_of
from engine.rank_harness import CONFIG, ROUNDS, rpc, run

from morphserve.integration.worker.kv import RankKV

CYCLES = int(os.environ.get("CYCLES", "30"))
# On several threads vLLM's matmuls round otherwise in a batch of another size, resizing or not.
pytestmark = pytest.mark.skipif(
    "ORACLE_REQUESTS" not in os.environ, reason="by hand, on one thread: ORACLE_REQUESTS=500 OMP_NUM_THREADS=1"
)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path, variant_cache: Path) -> Iterator[Any]:
    with engine(tiny_llama, variant_cache, CONFIG, skip_tokenizer_init=True) as started:
        yield started


def test_a_mix_of_requests_is_answered_as_without_resizing(llm: Any) -> None:
    """Guards: a copy, a table, a hash or an order of commands that fails under some mix of requests only."""
    sys.stdout.write(f"oracle, one rank: {oracle.check(llm)}\n")


def test_the_mix_can_tell(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an oracle that would not see a skipped copy."""
    monkeypatch.setattr(RankKV, "copy", lambda self, pairs: None)
    with pytest.raises(AssertionError, match="differ"):
        oracle.check(llm)


def test_resident_memory_follows_the_published_blocks(llm: Any) -> None:
    """Guards: pages that stay after a shrink, come too late, or add up over many cycles; under live requests."""
    morph = morph_of(llm)
    draw = random.Random(3)
    anonymous: list[int] = []
    worst = 0.0
    size = morph.pool.num_kv_blocks
    per_block = morph.runtime.kv_block_bytes
    with kv_script(llm, {}) as driver:
        for cycle in range(CYCLES):
            # One up and one down, of any size, while requests run; then what the kernel says.
            driver._script = {driver._step + 2: draw.randrange(100, 147), driver._step + 9: draw.randrange(24, 100)}
            run(llm, ROUNDS[cycle % len(ROUNDS)][:2])
            memory = rpc(llm, "morphserve_memory")[0]
            published = morph.pool.num_kv_blocks * per_block
            worst = max(worst, abs(memory["kv_resident_bytes"] / published - 1))
            anonymous.append(memory["anonymous"] - memory["kv_resident_bytes"])
    assert morph.pool.num_kv_blocks == size
    grown = min(anonymous[-5:]) - min(anonymous[CYCLES // 4 : CYCLES // 4 + 5])
    sys.stdout.write(f"{CYCLES} cycles: resident KV within {worst:.2%}, else grown by {grown / 2**20:.2f} MiB\n")
    assert worst <= 0.02
    assert grown < 4 * 2**20
