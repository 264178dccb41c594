"""VllmBlockPool on vLLM's real KVCacheManager: event by event, and each refusal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from seams.pool_harness import FLOOR, MAX_BLOCKS, KVModel, check_invariants, make_request
from vllm.distributed.kv_events import BlockRemoved
from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id
from vllm.v1.core.sched.request_queue import SchedulingPolicy

from morphserve.errors import IllegalTransition, LedgerError


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
    monkeypatch.setattr("morphserve.integration.engine.block_pool._OFFER_WALK", 3)
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


def test_who_watches_a_block_is_told_that_it_is_emptied() -> None:
    """Guards against a reader that goes on reading a block, by its id, which the shrink has given up."""
    kv = KVModel()
    told: list[int] = []
    kv.pool._reuse_watchers[30] = lambda block: told.append(block.block_id)
    kv.begin(20)
    assert told == [30]


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


@pytest.mark.parametrize(
    ("policy", "order"),
    [(SchedulingPolicy.FCFS, ["new", "old", "long"]), (SchedulingPolicy.PRIORITY, ["long", "new", "old"])],
)
def test_who_costs_least_is_preempted_first_and_the_last_stays(policy: SchedulingPolicy, order: list[str]) -> None:
    """Guards against a restore that throws away the longest context, the oldest request or the most urgent one, or that
    stops the only request there is, so that nothing is ever free."""
    port, gone = KVModel().port, list[str]()
    running = [("urgent", 0, 900), ("long", 5, 800), ("old", 1, 4), ("new", 1, 4)]
    if policy == SchedulingPolicy.FCFS:
        running[0] = ("longest", 9, 900)
    port._scheduler.policy = policy
    port._scheduler.running = [
        SimpleNamespace(request_id=name, priority=priority, num_computed_tokens=num_tokens)
        for name, priority, num_tokens in running
    ]
    port.send_back = port._scheduler.running.remove  # type: ignore[method-assign]
    port.on_forced_preemption = lambda request: gone.append(request.request_id)
    while port.preempt_one():
        pass
    assert gone == order and len(port._scheduler.running) == 1
