"""vLLM's block pool as one thing that grows and shrinks at its end.

The workers' KV configuration stays at the maximum number of blocks for ever: strides, addresses and
block table widths never change. Only the scheduler's pool changes, through vLLM's own objects:

* Grow appends new `KVCacheBlock`s. Shrink takes blocks off the end.
* A live block is moved by exchanging ids between two block objects. Request tables, the prefix cache,
  deferred frees and copy-on-write lists hold the object, so none of them is touched, whatever its
  reference count. The workers then copy the KV and rewrite the ids in their cached block tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice, takewhile
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, UniformTypeKVCacheSpecs

from morphserve.controller.ports import ShrinkProgress
from morphserve.errors import ConfigError, IllegalTransition, LedgerError

_OFFER_WALK = 4096  # free blocks looked at before new ones are put among them


def check_supported(vllm_config: Any, kv_cache_config: KVCacheConfig) -> None:
    """Refuse engines whose KV blocks cannot be renamed or whose tail cannot be given back.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        kv_cache_config: The workers' or the scheduler's KV cache configuration.

    Raises:
        ConfigError: Names the setting, what is supported and what to change.
    """
    _check_groups(kv_cache_config)
    if vllm_config.kv_transfer_config is not None:
        raise ConfigError(
            f"KV connector {vllm_config.kv_transfer_config.kv_connector!r} is configured: it may read or "
            "write blocks between steps, so they cannot be moved. Remove --kv-transfer-config."
        )
    if vllm_config.speculative_config is not None:
        raise ConfigError(
            "speculative decoding is configured: draft models keep block tables that MorphServe does "
            "not rewrite. Remove --speculative-config."
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name)) != 1:
            raise ConfigError(f"{name} is {size}, only 1 is supported. Leave it at 1.")


def _check_groups(kv_cache_config: KVCacheConfig) -> None:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(sorted({type(g.kv_cache_spec).__name__ for g in groups})) or "none"
        raise ConfigError(
            f"the model has {len(groups)} KV cache groups ({kinds}), exactly 1 of full attention is "
            "supported. Sliding-window hybrids: try --disable-hybrid-kv-cache-manager; Mamba, "
            "encoder-decoder and attention-free models: run without --plugin morphserve."
        )
    spec = groups[0].kv_cache_spec
    members: Iterable[Any] = [spec]
    if isinstance(spec, UniformTypeKVCacheSpecs):
        members = spec.kv_cache_specs.values()
    if wrong := sorted({type(s).__name__ for s in members if not isinstance(s, FullAttentionSpec)}):
        raise ConfigError(
            f"the KV cache is of kind {', '.join(wrong)}, only full attention is supported. "
            "Run this model without --plugin morphserve."
        )


class VllmBlockPool:
    """`BlockPoolPort` on a live vLLM scheduler. Call it between two `schedule()` calls only.

    1. From `begin_shrink(n)` on, the free queue holds no block with id >= n: free ones leave at
       once, live ones at the moment vLLM frees them. (A prefix hit may still add a reference to a
       live tail block; it is moved or drained like any other.)
    2. `pool.num_gpu_blocks` is at every moment the null block + free + used, fenced ones excluded,
       so vLLM's own usage gauge stays in [0, 1] and counts what can be used.
    3. Block 0, vLLM's null block, never moves.
    4. No call costs more than the blocks it changes and a look at `_OFFER_WALK` free ones, however large the
       pool is.
    """

    def __init__(self, scheduler: Any) -> None:
        """Take over the pool of `scheduler`, whose KV configuration has the maximum block count.

        Raises:
            ConfigError: This engine's pool cannot be resized.
        """
        check_supported(scheduler.vllm_config, scheduler.kv_cache_config)
        self._scheduler = scheduler
        self._manager = scheduler.kv_cache_manager
        self._pool = self._manager.block_pool
        self.max_num_blocks: int = len(self._pool.blocks)
        block_size = self._manager.coordinator.single_type_managers[0].block_size
        # One request of max_model_len and the null block: below this a long request never runs.
        self.min_num_blocks: int = -(-self._manager.max_model_len // block_size) + 1
        self._published = self.max_num_blocks
        self._limit: int | None = None  # first fenced id while a shrink is in progress
        self._live_tail: dict[int, KVCacheBlock] = {}  # id >= _limit, ref count above 0

    @property
    def num_kv_blocks(self) -> int:
        """Published blocks, null block included."""
        return self._published

    @property
    def num_used_blocks(self) -> int:
        """Blocks that live requests hold, without the null block."""
        return int(self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks())

    @property
    def shrinking(self) -> bool:
        """A shrink has begun and is neither finished nor cancelled."""
        return self._limit is not None

    def grow(self, num_kv_blocks: int) -> None:
        """Publish blocks up to `num_kv_blocks`. Only after every rank has mapped them.

        Raises:
            IllegalTransition: A shrink is in progress, or the pool is larger already.
            LedgerError: More than the workers reserved.
        """
        if self._limit is not None:
            raise IllegalTransition(
                f"grow to {num_kv_blocks} blocks while a shrink to {self._limit} is in progress. "
                "Cancel the shrink first."
            )
        if num_kv_blocks > self.max_num_blocks:
            raise LedgerError(
                f"grow to {num_kv_blocks} blocks, the workers reserved {self.max_num_blocks}. "
                "Lower kv.max_num_blocks or the ladder's deepest level."
            )
        if num_kv_blocks < self._published:
            raise IllegalTransition(
                f"grow to {num_kv_blocks} blocks, {self._published} are published. Use begin_shrink."
            )
        pool = self._pool
        new = [KVCacheBlock(i, pool=pool) for i in range(self._published, num_kv_blocks)]
        pool.blocks.extend(new)
        self._offer(new)
        self._publish(num_kv_blocks)

    def begin_shrink(self, num_kv_blocks: int) -> None:
        """Fence: no block with id >= `num_kv_blocks` is handed out from now on.

        Free tail blocks leave the free queue and the prefix cache (with the usual KV events).

        Raises:
            IllegalTransition: A shrink is in progress, or the pool is not larger than that.
            LedgerError: Below one request of max_model_len.
        """
        if self._limit is not None:
            raise IllegalTransition(
                f"shrink to {num_kv_blocks} blocks while a shrink to {self._limit} is in progress. "
                "Finish or cancel that one first."
            )
        if num_kv_blocks >= self._published:
            raise IllegalTransition(
                f"shrink to {num_kv_blocks} blocks, {self._published} are published. Use grow."
            )
        if num_kv_blocks < self.min_num_blocks:
            raise LedgerError(
                f"shrink to {num_kv_blocks} blocks, one request of {self._manager.max_model_len} tokens "
                f"needs {self.min_num_blocks}. Lower --max-model-len or raise kv.base_num_blocks."
            )
        self._limit = num_kv_blocks
        for block in self._pool.blocks[num_kv_blocks:]:
            if block.ref_cnt == 0:
                self._fence(block)
            else:
                self._live_tail[block.block_id] = block
        self._hook_free()

    def advance_shrink(self, max_copies: int) -> ShrinkProgress:
        """Rename up to `max_copies` live tail blocks downwards, as free low blocks allow.

        Returns:
            The (source, destination) ids whose KV every rank must copy before its next forward
            pass, sources all >= the new end and destinations all below it, and what is still live.

        Raises:
            IllegalTransition: No shrink is in progress.
        """
        limit = self._require_shrink("advance_shrink")
        pool = self._pool
        room = min(max_copies, pool.get_num_free_blocks())
        # A block with a reuse watcher is read by somebody who knows it by its id: leave it to drain.
        movable = (b for b in self._live_tail.values() if b.block_id not in pool._reuse_watchers)
        chosen = list(islice(movable, max(room, 0)))
        copies = []
        for block, target in zip(chosen, pool.get_new_blocks(len(chosen)), strict=True):
            assert target.block_id < limit <= block.block_id
            copies.append((block.block_id, target.block_id))
            self._exchange_ids(block, target)
        return ShrinkProgress(copies=tuple(copies), num_live_tail=len(self._live_tail))

    def finish_shrink(self) -> None:
        """Forget the fenced tail.

        Raises:
            IllegalTransition: No shrink is in progress, or live blocks are still in the tail.
        """
        limit = self._require_shrink("finish_shrink")
        if self._live_tail:
            raise IllegalTransition(
                f"finish_shrink at {limit} blocks with {len(self._live_tail)} live blocks above. "
                "Call advance_shrink until num_live_tail is 0, or cancel_shrink."
            )
        del self._pool.blocks[limit:]
        self._end_shrink()
        self._publish(limit)

    def cancel_shrink(self) -> None:
        """Give the fenced blocks back to the scheduler. Renames already done stay (harmless).

        Raises:
            IllegalTransition: No shrink is in progress.
        """
        limit = self._require_shrink("cancel_shrink")
        fenced = [b for b in self._pool.blocks[limit:] if b.block_id not in self._live_tail]
        self._end_shrink()
        self._offer(fenced)
        self._pool.num_gpu_blocks = self._published

    # ---- internals ----

    def _require_shrink(self, what: str) -> int:
        if self._limit is None:
            raise IllegalTransition(f"{what} without begin_shrink ({self._published} blocks published).")
        return self._limit

    def _end_shrink(self) -> None:
        self._limit = None
        self._live_tail.clear()
        self._unhook_free()

    def _publish(self, num_kv_blocks: int) -> None:
        """Everything in the scheduler that is derived from the number of blocks."""
        self._published = num_kv_blocks
        self._pool.num_gpu_blocks = num_kv_blocks
        scheduler = self._scheduler
        scheduler.kv_cache_config.num_blocks = num_kv_blocks
        scheduler.cache_config.num_gpu_blocks = num_kv_blocks
        self._manager.watermark_blocks = int(scheduler.scheduler_config.watermark * num_kv_blocks)

    def _offer(self, blocks: list[KVCacheBlock]) -> None:
        """Put empty blocks behind the other empty ones and ahead of the cached ones.

        That is vLLM's own order: no prefix cache entry is evicted while an empty block is left. Low ids first,
        because a shrink must move what lives at the end; where more than `_OFFER_WALK` are empty, the others come
        after the new ones.
        """
        queue = self._pool.free_block_queue
        first = islice(queue.iter_blocks_after(None), _OFFER_WALK)
        num_empty = sum(1 for _ in takewhile(lambda block: block.block_hash is None, first))
        queue.prepend_n(queue.popleft_n(num_empty) + blocks)

    def _fence(self, block: KVCacheBlock) -> None:
        """Take a free tail block out of the free queue and the prefix cache."""
        self._pool.free_block_queue.remove(block)
        self._pool._maybe_evict_cached_block(block)
        if self._pool._reuse_watchers:
            self._pool._notify_reuse([block])
        self._pool.num_gpu_blocks -= 1

    def _exchange_ids(self, block: KVCacheBlock, target: KVCacheBlock) -> None:
        """Give live tail `block` the id of `target`, which was just taken and becomes fenced."""
        pool = self._pool
        high, low = block.block_id, target.block_id
        extra = pool.cached_block_hashes_by_block.pop(high, None)
        hashes = [h for h in (block.block_hash, *(extra or ())) if h is not None]
        lookup = pool.cached_block_hash_to_block
        hashes = [h for h in hashes if lookup.pop(h, high) is not None]

        block.block_id, target.block_id = low, high
        pool.blocks[low], pool.blocks[high] = block, target
        target.ref_cnt = 0
        del self._live_tail[high]
        pool.num_gpu_blocks -= 1

        for key in hashes:
            lookup.insert(key, block)
        if extra is not None:
            pool.cached_block_hashes_by_block[low] = extra
        if pool.metrics_collector is not None:
            ages = pool.metrics_collector.block_metrics
            ages.pop(low, None)  # sampled when `target` was taken; it holds nothing
            if (age := ages.pop(high, None)) is not None:
                ages[low] = age

    def _hook_free(self) -> None:
        """While a shrink lasts, fence tail blocks in the call that frees them.

        Without it a freed tail block would be back in the free queue until the next
        `advance_shrink` and could be handed out again: not unsafe, it is still mapped, but a busy
        scheduler could keep the tail alive for ever. Calls vLLM's method, then looks at the result.
        """
        pool = self._pool
        original = pool.free_blocks

        def free_blocks(ordered_blocks: Iterable[KVCacheBlock], *args: Any, **kwargs: Any) -> None:
            blocks = list(ordered_blocks)
            original(blocks, *args, **kwargs)
            for block in blocks:
                if block.ref_cnt == 0 and self._live_tail.pop(block.block_id, None) is not None:
                    self._fence(block)

        self._free_hook = free_blocks
        pool.free_blocks = free_blocks

    def _unhook_free(self) -> None:
        """Back to the class's method. A wrapper that somebody put over ours stays: ours is then
        inert, since the live tail is empty."""
        if self._pool.__dict__.get("free_blocks") is self._free_hook:
            del self._pool.free_blocks
