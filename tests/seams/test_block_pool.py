"""VllmBlockPool on vLLM's real KVCacheManager: any order of events, and each refusal."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from seams.pool_harness import (
    BLOCK,
    MAX_BLOCKS,
    KVModel,
    full_attention,
    kv_config,
    make_request,
    vllm_config,
)
from vllm.distributed.kv_events import BlockRemoved
from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id
from vllm.v1.kv_cache_interface import MambaSpec, SlidingWindowSpec

from morphserve.errors import ConfigError, IllegalTransition, LedgerError
from morphserve.integration.block_pool import blocks_of_one_request, check_supported

FLOOR = 7  # blocks: one request of 24 tokens and the null block


def check_invariants(kv: KVModel) -> None:
    """Everything that must hold between two steps."""
    pool, port = kv.pool, kv.port
    limit = port.num_kv_blocks if kv.fence is None else kv.fence
    assert [b.block_id for b in pool.blocks] == list(range(port.num_kv_blocks))
    assert pool.blocks[0] is pool.null_block

    tables = {r: kv.manager.coordinator.single_type_managers[0].req_to_blocks[r] for r in kv.requests}
    held = Counter(b.block_id for blocks in tables.values() for b in blocks)
    assert {b.block_id: b.ref_cnt for b in pool.blocks[1:] if b.ref_cnt} == held
    assert all(pool.blocks[b.block_id] is b for blocks in tables.values() for b in blocks)

    free = [b.block_id for b in pool.free_block_queue.get_all_free_blocks()]
    vacant = [b.block_id for b in port._vacant]
    tail = {i for i in (*free, *held) if i >= limit}
    assert tail == port._tail.keys()
    assert sorted([*free, *held, *vacant]) == [*range(1, limit), *sorted(tail)]
    assert len(vacant) == len(tail) or (len(vacant) < len(tail) and not free), "traffic can take the tail's room"
    assert pool.get_num_free_blocks() == len(free)

    assert port.num_used_blocks == len(held)
    assert pool.get_usage() == pytest.approx(len(held) / (len(held) + len(free)))
    for block_hash, entry in pool.cached_block_hash_to_block._cache.items():
        blocks = entry if isinstance(entry, dict) else {entry.block_id: entry}
        for block_id, block in blocks.items():
            assert pool.blocks[block_id] is block
            assert block.block_hash == block_hash
            assert block_id < limit or block_id in tail
    for block in pool.blocks:
        if block.block_hash is not None:
            assert pool.cached_block_hash_to_block.contain(block.block_hash, block.block_id)

    for request_id, request in kv.requests.items():
        tokens = tuple(request.all_token_ids)
        context = kv.context(request)
        assert [read for read, _ in context] == [tokens[: p + 1] for p in range(len(context))]
        if request_id in kv.clean:
            assert not any(degraded for _, degraded in context), f"{request_id} reads degraded KV"


class PoolMachine(RuleBasedStateMachine):
    """Requests come, grow, share prefixes, end and are preempted while the pool resizes and levels change."""

    @initialize(blocks=st.integers(FLOOR, MAX_BLOCKS - 1))
    def start(self, blocks: int) -> None:
        self.kv = KVModel()
        self.names = iter(range(10_000))
        self.kv.begin(blocks)
        self.kv.finish()

    def pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.kv.requests)))

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=18))
    def arrive(self, tokens: list[int]) -> None:
        self.kv.step(make_request(f"r{next(self.names)}", tokens))

    @precondition(lambda self: self.kv.requests)
    @rule(data=st.data(), extra=st.lists(st.integers(0, 1), min_size=0, max_size=3))
    def fork(self, data: st.DataObject, extra: list[int]) -> None:
        prefix = list(self.kv.requests[self.pick(data)].all_token_ids)
        self.kv.step(make_request(f"r{next(self.names)}", (prefix + extra)[:20]))

    @precondition(lambda self: self.kv.requests)
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data: st.DataObject, token: int) -> None:
        request = self.kv.requests[self.pick(data)]
        if request.num_tokens < 23:
            request.append_output_token_ids(token)
            if not self.kv.step(request):
                self.kv.end(request.request_id)

    @precondition(lambda self: self.kv.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.kv.end(self.pick(data))

    @precondition(lambda self: self.kv.requests)
    @rule(data=st.data())
    def preempt_and_resume(self, data: st.DataObject) -> None:
        request = self.kv.preempt(self.pick(data))
        if not self.kv.step(request):
            self.kv.provenance.forget(request.request_id)

    @rule(level=st.integers(0, 2))
    def switch_level(self, level: int) -> None:
        self.kv.set_level(level)

    @precondition(lambda self: self.kv.fence is None)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        self.kv.port.grow(data.draw(st.integers(self.kv.port.num_kv_blocks, MAX_BLOCKS)))

    @precondition(lambda self: self.kv.fence is None and self.kv.port.num_kv_blocks > FLOOR)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.kv.begin(data.draw(st.integers(FLOOR, self.kv.port.num_kv_blocks - 1)))

    @precondition(lambda self: self.kv.fence is not None)
    @rule(max_copies=st.integers(0, 6), then_finish=st.booleans())
    def advance(self, max_copies: int, then_finish: bool) -> None:
        if self.kv.advance(max_copies) == 0 and then_finish:
            self.kv.finish()

    @precondition(lambda self: self.kv.fence is not None)
    @rule()
    def cancel(self) -> None:
        self.kv.cancel()

    @invariant()
    def everything_holds(self) -> None:
        """Guards against a block handed out twice, lost, leaked, read after its move, or degraded."""
        if hasattr(self, "kv"):
            check_invariants(self.kv)

    def teardown(self) -> None:
        """Guards against blocks that no sequence of ends gives back."""
        if not hasattr(self, "kv"):
            return
        for request_id in list(self.kv.requests):
            self.kv.end(request_id)
        if self.kv.fence is not None:
            assert self.kv.advance(0) == 0
            self.kv.finish()
        check_invariants(self.kv)
        assert self.kv.port.num_used_blocks == 0


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


def shrunk_with(kv: KVModel, *prompts: list[int]) -> list[Any]:
    """Requests whose blocks all lie at the end of the pool."""
    filler = [make_request(f"fill{i}", [9, i] * 8) for i in range(6)]
    requests = [make_request(f"r{i}", p) for i, p in enumerate(prompts)]
    for request in (*filler, *requests):
        assert kv.step(request)
    for request in filler:
        kv.end(request.request_id)
    return requests


def test_publishing_updates_everything_derived_from_the_count() -> None:
    """Guards against an admission watermark or a reported size that belongs to another pool size."""
    kv = KVModel()
    s = kv.scheduler
    for blocks in (20, 30):
        if blocks < kv.port.num_kv_blocks:
            kv.begin(blocks)
            kv.finish()
        else:
            kv.port.grow(blocks)
        assert kv.port.num_kv_blocks == kv.pool.num_gpu_blocks == len(kv.pool.blocks) == blocks
        assert s.kv_cache_config.num_blocks == s.cache_config.num_gpu_blocks == blocks
        assert kv.manager.watermark_blocks == blocks // 10


def test_shared_and_duplicate_blocks_keep_their_prefix_hits_when_moved() -> None:
    """Guards against a rename that loses or misdirects entries of the prefix cache."""
    kv = KVModel()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]  # its last block is computed twice: a duplicate hash
    first, second = shrunk_with(kv, prompt, prompt)
    entry = kv.pool.cached_block_hash_to_block._cache[kv.pool.blocks[26].block_hash]
    assert isinstance(entry, dict) and len(entry) == 2
    assert kv.pool.blocks[25].ref_cnt == 2
    kv.begin(20)
    assert kv.advance(99) == 0
    kv.finish()
    check_invariants(kv)
    third = make_request("third", [*prompt, 0])
    _, hits, _ = kv.manager.get_computed_blocks(third)
    assert hits == len(prompt)
    assert kv.step(third)
    check_invariants(kv)


def test_a_block_freed_during_the_fence_is_not_handed_out() -> None:
    """Guards against a tail that never drains because freed tail blocks are taken again at once."""
    kv = KVModel()
    (request,) = shrunk_with(kv, [1, 2, 3, 4, 5])
    kv.begin(20)
    assert kv.advance(0) == 7  # two of the request, five of the fillers that are worth keeping
    kv.end(request.request_id)
    assert kv.port.advance_shrink(0).num_live_tail == 6  # its second block is empty now, and fenced
    check_invariants(kv)


def test_traffic_cannot_take_the_room_of_the_tail() -> None:
    """Guards against a drain that a busy scheduler keeps from ending: it took every free block below the fence."""
    kv = KVModel(watermark=0.0)
    shrunk_with(kv, [1, 2, 3, 4, 5])
    kv.begin(20)
    for number in range(3):
        assert kv.step(make_request(f"late{number}", [7, number] * 8))
    assert not kv.step(make_request("too many", [8] * 24))
    check_invariants(kv)
    assert kv.advance(99) == 0
    kv.finish()
    check_invariants(kv)


def test_a_shrink_gives_up_the_coldest_blocks_wherever_they_lie() -> None:
    """Guards against losing the newest prefixes because their blocks happened to lie at the end of the pool."""
    kv = KVModel(enable_kv_cache_events=True)
    (request,) = shrunk_with(kv, [1, 2, 3, 4, 5])
    kv.end(request.request_id)
    kv.pool.take_events()
    order = [b for b in kv.pool.free_block_queue.get_all_free_blocks() if b.block_hash is not None]
    assert len(order) == 25 and len(kv.pool.blocks) == 40
    kv.begin(20)
    while kv.advance(2):
        check_invariants(kv)
    kv.finish()
    assert kv.pool.free_block_queue.get_all_free_blocks() == order[-19:]
    assert len([e for e in kv.pool.take_events() if isinstance(e, BlockRemoved)]) == 25 - 19
    check_invariants(kv)


def test_a_cached_tail_block_that_loses_its_hash_is_not_copied() -> None:
    """Guards against copying what the prefix cache has dropped meanwhile, and against its room staying reserved."""
    kv = KVModel()
    (request,) = shrunk_with(kv, [1, 2, 3, 4, 5])
    kv.end(request.request_id)
    kv.begin(20)
    assert kv.advance(0) == 6
    kv.pool.evict_blocks({b.block_id for b in kv.pool.blocks[20:] if b.block_hash is not None})
    progress = kv.port.advance_shrink(99)
    assert progress.copies == () and progress.num_live_tail == 0
    kv.finish()
    check_invariants(kv)


def test_cancel_gives_everything_back() -> None:
    """Guards against fenced blocks lost for ever, and against vLLM's method staying replaced."""
    kv = KVModel()
    (request,) = shrunk_with(kv, [1, 2, 3, 4, 5])
    kv.begin(20)
    assert "free_blocks" in vars(kv.pool)
    kv.advance(1)
    kv.cancel()
    assert "free_blocks" not in vars(kv.pool)
    assert kv.pool.get_num_free_blocks() == MAX_BLOCKS - 1 - 2
    kv.end(request.request_id)
    check_invariants(kv)


def test_empty_blocks_are_offered_before_cached_ones() -> None:
    """Guards against a grow after which vLLM evicts prefixes although empty blocks are there."""
    kv = KVModel()
    kv.begin(10)
    kv.finish()
    assert kv.step(make_request("a", [1] * 8))
    kv.end("a")
    kv.port.grow(12)
    ids = [b.block_id for b in kv.pool.free_block_queue.get_all_free_blocks()]
    assert ids == [3, 4, 5, 6, 7, 8, 9, 10, 11, 2, 1]


def test_a_large_pool_is_not_walked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a grow that pauses the engine for milliseconds because 100,000 blocks are free."""
    monkeypatch.setattr("morphserve.integration.block_pool._OFFER_WALK", 3)
    kv = KVModel()
    kv.begin(10)
    kv.finish()
    assert kv.step(make_request("a", [1] * 8))
    kv.end("a")
    taken: list[int] = []
    queue = kv.pool.free_block_queue
    monkeypatch.setattr(queue, "popleft_n", lambda n: taken.append(n) or type(queue).popleft_n(queue, n))
    kv.port.grow(12)
    assert [b.block_id for b in queue.get_all_free_blocks()] == [3, 4, 5, 10, 11, 6, 7, 8, 9, 2, 1]
    assert taken == [3]
    check_invariants(kv)


def test_watched_blocks_stay_until_they_drain() -> None:
    """Guards against renaming a block that somebody reads by its id."""
    kv = KVModel()
    (request,) = shrunk_with(kv, [1, 2, 3, 4, 5])
    kv.pool._reuse_watchers[25] = lambda block: None
    kv.begin(20)
    assert kv.advance(99) == 1
    assert kv.advance(99) == 1
    kv.end(request.request_id)
    assert kv.advance(99) == 0


def test_secondary_hashes_and_metrics_move_with_the_block() -> None:
    """Guards against tables keyed by block id that keep the old id."""
    kv = KVModel(metrics_collector=KVCacheMetricsCollector(sample_rate=1.0))
    (request,) = shrunk_with(kv, [1, 2, 3, 4, 5])
    block = kv.pool.blocks[25]
    key = make_block_hash_with_group_id(BlockHash(b"second"), 0)
    kv.pool._insert_block_hash(key, block, num_tokens=2)
    ages = kv.pool.metrics_collector.block_metrics
    age, unsampled = ages[25], kv.pool.blocks[26]
    del ages[26]
    kv.begin(20)
    assert kv.advance(99) == 0
    assert block.block_id < 20
    assert kv.pool.cached_block_hashes_by_block == {block.block_id: {key}}
    assert kv.pool.cached_block_hash_to_block.contain(key, block.block_id)
    assert ages[block.block_id] is age
    assert 25 not in ages and unsampled.block_id not in ages
    kv.finish()
    kv.end(request.request_id)


def test_illegal_moves_are_refused_and_change_nothing() -> None:
    """Guards against a controller bug that publishes unmapped blocks or drops live ones."""
    kv = KVModel()
    (_,) = shrunk_with(kv, [1, 2, 3, 4, 5])
    port = kv.port
    for call in (port.finish_shrink, port.cancel_shrink, lambda: port.advance_shrink(1)):
        with pytest.raises(IllegalTransition, match="without begin_shrink"):
            call()
    with pytest.raises(LedgerError, match="workers reserved 40"):
        port.grow(MAX_BLOCKS + 1)
    with pytest.raises(IllegalTransition, match="Use begin_shrink"):
        port.grow(MAX_BLOCKS - 1)
    with pytest.raises(IllegalTransition, match="Use grow"):
        port.begin_shrink(MAX_BLOCKS)
    with pytest.raises(LedgerError, match=f"needs {FLOOR}"):
        port.begin_shrink(FLOOR - 1)
    kv.begin(20)
    with pytest.raises(IllegalTransition, match="Cancel the shrink first"):
        port.grow(MAX_BLOCKS)
    with pytest.raises(IllegalTransition, match="cancel that one first"):
        port.begin_shrink(10)
    with pytest.raises(IllegalTransition, match="7 live or cached blocks above"):
        port.finish_shrink()
    check_invariants(kv)


MAMBA = MambaSpec(block_size=BLOCK, shapes=((1, 1),), dtypes=(torch.float32,))


def sliding(window: int) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=window
    )


def test_the_floor_counts_every_group() -> None:
    """Guards against a pool in which the longest request waits for ever: each group holds blocks of its own."""
    config = vllm_config(max_in_flight_tokens=8)
    assert blocks_of_one_request(config, kv_config(full_attention())) == FLOOR
    assert blocks_of_one_request(config, kv_config(full_attention(), sliding(1000))) == 2 * FLOOR - 1
    # A window of 5 tokens, of which the last is new, 8 in flight: 12 tokens, from the middle of a block.
    assert blocks_of_one_request(config, kv_config(full_attention(), sliding(5))) == FLOOR + 4


@pytest.mark.parametrize(
    ("config", "kv_cache", "message"),
    [
        ({}, kv_config(), "of kind none"),
        ({}, kv_config(full_attention(), MAMBA), "of kind .*MambaSpec"),
        ({"kv_transfer_config": SimpleNamespace(kv_connector="Nixl")}, None, "--kv-transfer-config"),
        (
            {
                "parallel_config": SimpleNamespace(
                    decode_context_parallel_size=2, prefill_context_parallel_size=1
                )
            },
            None,
            "decode_context_parallel_size is 2",
        ),
    ],
)
def test_unsupported_engines_are_refused(config: dict[str, Any], kv_cache: Any, message: str) -> None:
    """Guards against starting on a model or set-up whose KV the pool would corrupt."""
    with pytest.raises(ConfigError, match=message):
        check_supported(vllm_config(**config), kv_cache or kv_config(full_attention()))
