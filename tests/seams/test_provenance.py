"""Provenance on vLLM's real KVCacheManager: level 0 never reads KV of another level."""

from __future__ import annotations

import pytest
from seams.pool_harness import KVModel, make_request

from morphserve.integration.provenance import Provenance, requests_with_kv

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]  # two full blocks and one token


def hits(kv: KVModel, tokens: list[int]) -> int:
    """Tokens a new request with this prompt would take from the prefix cache."""
    return kv.manager.get_computed_blocks(make_request("probe", tokens))[1]


def test_only_degraded_blocks_leave_the_cache_at_level_0() -> None:
    """Guards against degraded hits at level 0, and against throwing clean prefixes away with them."""
    kv = KVModel()
    assert kv.step(make_request("clean", PROMPT))
    kv.set_level(1)
    degraded = [0, *PROMPT]
    assert kv.step(make_request("degraded", degraded))
    assert kv.step(make_request("extends", [*PROMPT, 1, 1, 1, 1]))
    assert kv.provenance.is_tainted("degraded")
    assert hits(kv, degraded) == 8
    assert hits(kv, [*PROMPT, 1, 1, 1, 1]) == 12
    kv.set_level(0)
    assert hits(kv, degraded) == 0
    assert hits(kv, [*PROMPT, 1, 1, 1, 1]) == 8
    assert kv.provenance.num_degraded_blocks == 0


def test_a_request_that_ran_degraded_caches_nothing_more() -> None:
    """Guards against full-precision layers over degraded context entering the cache as clean."""
    kv = KVModel()
    kv.set_level(1)
    request = make_request("short", [5, 6])  # caches no block while degraded
    assert kv.step(request)
    kv.set_level(0)
    for token in range(10):
        request.append_output_token_ids(token)
        assert kv.step(request)
    tokens = list(request.all_token_ids)
    assert kv.provenance.is_tainted("short")
    assert hits(kv, tokens) == 0
    kv.end("short")
    assert not kv.provenance.is_tainted("short")
    assert kv.step(make_request("short", tokens))  # the same id again, clean
    assert hits(kv, [*tokens, 1]) == 12


def test_a_request_recomputed_at_level_0_is_clean_again() -> None:
    """Guards against a preempted request that is barred from the cache although nothing degraded is left."""
    kv = KVModel()
    kv.set_level(1)
    assert kv.step(make_request("r", PROMPT))
    kv.set_level(0)
    assert kv.step(kv.preempt("r"))
    assert not kv.provenance.is_tainted("r")
    assert hits(kv, PROMPT) == 8


def test_a_degraded_block_that_was_unmapped_is_left_alone() -> None:
    """Guards against evicting, by the id of a block that is gone, the hashes of the one that has it now."""
    kv = KVModel()
    kv.set_level(1)
    fillers = [make_request(f"fill{i}", [9, i] * 8) for i in range(6)]
    for request in (*fillers, make_request("tail", PROMPT)):
        assert kv.step(request)
    for request in fillers:
        kv.end(request.request_id)
    kv.end("tail")
    kv.begin(20)
    kv.finish()
    kv.port.grow(40)
    kv.pool.cached_block_hashes_by_block[25] = {b"of the new block 25"}  # type: ignore[arg-type]
    kv.set_level(0)
    assert 25 in kv.pool.cached_block_hashes_by_block


def test_partial_entries_follow_the_same_rules() -> None:
    """Guards against the second way into vLLM's prefix cache, which block hashes finer than blocks use."""
    kv = KVModel()
    request = make_request("r", [1, 2, 3, 4])
    assert kv.step(request)
    block = kv.pool.blocks[30]
    kv.set_level(1)
    assert kv.pool.cache_partial_block(request, block, 4, 0, 4) == block.block_hash
    assert block.block_hash is not None
    kv.set_level(0)
    assert block.block_hash is None
    assert kv.pool.cache_partial_block(request, block, 4, 0, 4) is None
    assert block.block_hash is None
    fresh = make_request("fresh", [5, 6, 7, 8])
    assert kv.pool.cache_partial_block(fresh, block, 4, 0, 4) == block.block_hash
    assert kv.provenance.num_degraded_blocks == 0


def test_who_holds_kv() -> None:
    """Guards against a switch that misses a request with KV, or names one without."""
    kv = KVModel()
    for name in "abc":
        assert kv.step(make_request(name, [ord(name)] * 5))
    kv.preempt("b")
    assert requests_with_kv(kv.scheduler) == ["a", "c"]


def test_uninstall_leaves_the_pool_as_found() -> None:
    """Guards against wrappers that outlive the plugin."""
    kv = KVModel()
    kv.provenance.uninstall()
    assert not {"cache_full_blocks", "cache_partial_block"} & set(vars(kv.pool))
    again = Provenance(kv.pool)
    again.set_level(2)
    assert kv.step(make_request("r", PROMPT))
    assert (again.level, again.num_degraded_blocks) == (2, 2)


@pytest.mark.parametrize("level", [0, 1])
def test_cached_blocks_are_unchanged_by_the_wrapper(level: int) -> None:
    """Guards against a call-through that loses an argument or caches more than it was told to."""
    kv = KVModel()
    kv.set_level(level)
    assert kv.step(make_request("r", PROMPT))
    assert [b.block_id for b in kv.pool.blocks if b.block_hash is not None] == [1, 2]
