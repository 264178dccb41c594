"""vLLM's block pool as one thing that grows and shrinks at its end.

The workers' KV configuration stays at the maximum number of blocks for ever: strides, addresses and
block table widths never change. Only the scheduler's pool changes, through vLLM's own objects:

* Grow appends new `KVCacheBlock`s. Shrink takes blocks off the end.
* A block is moved by exchanging ids between two block objects. Request tables, the prefix cache,
  deferred frees and copy-on-write lists hold the object, so none of them is touched, whatever its
  reference count. The workers then copy the KV and rewrite the ids in their cached block tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice, takewhile
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler

from morphserve.control import ShrinkProgress
from morphserve.errors import IllegalTransition, LedgerError
from morphserve.integration import seams
from morphserve.integration.engine.resizable import blocks_of_one_request, check_supported

_OFFER_WALK = 4096  # free blocks looked at before new ones are put among them


def _is_empty(block: KVCacheBlock) -> bool:
    """Free, and holds nothing that a request could hit."""
    return block.ref_cnt == 0 and block.block_hash is None


class VllmBlockPool:
    """`BlockPoolPort` on a live vLLM scheduler. Call it between two `schedule()` calls only.

    1. From `begin_shrink(n)` on, fenced blocks (id >= n) are never handed out, and their number only rises.
       A tail block in use, live or cached, keeps a vacant block below it in reserve, so that traffic cannot
       take the room it will move to. Only if fewer blocks are free than the shrink gives up, some tail
       blocks have none yet: whatever is freed then becomes theirs first.
    2. `pool.num_gpu_blocks` is at every moment the null block + free + used, fenced and vacant ones
       excluded, so vLLM's own usage gauge stays in [0, 1] and counts what can be used.
    3. Block 0, vLLM's null block, never moves.
    4. No call costs more than the blocks it changes and a look at `_OFFER_WALK` free ones, however large the
       pool is.
    5. The prefix cache hits what an LRU of the pool's size at that moment would hit.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        """Take over the pool of `scheduler`, whose KV configuration has the maximum block count.

        Raises:
            ConfigError: This engine's pool cannot be resized.
        """
        check_supported(scheduler.vllm_config, scheduler.kv_cache_config)
        self._scheduler = scheduler
        self._manager = scheduler.kv_cache_manager
        self._pool = self._manager.block_pool
        self.max_num_blocks: int = len(self._pool.blocks)
        self.min_num_blocks: int = blocks_of_one_request(scheduler.vllm_config, scheduler.kv_cache_config)
        self._published = self.max_num_blocks
        self._limit: int | None = None  # first fenced id while a shrink is in progress
        self._tail: dict[int, KVCacheBlock] = {}  # id >= _limit, not fenced: live, or cached and free
        self._vacant: list[KVCacheBlock] = []  # id < _limit, empty, out of the free queue: where the tail goes
        self.before_forced_preemption: Callable[[Any], None] = lambda request: None
        self.on_forced_preemption: Callable[[Any], None] = lambda request: None
        self._hook_error: Exception | None = None  # of ours, within a call of vLLM's; the next call of ours raises it
        self.is_discarding = False  # what vLLM preempts now is not for want of memory

    @property
    def num_kv_blocks(self) -> int:
        """Published blocks, null block included."""
        return self._published

    @property
    def num_used_blocks(self) -> int:
        """Blocks that live requests hold, without the null block."""
        return int(self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks())

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
        """Offer no more blocks from now on than `num_kv_blocks` have room for.

        What the prefix cache loses is what an LRU of that size would: empty blocks first, then the least
        recently used ones (with the usual KV events), wherever they lie.

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
        self._tail = {block.block_id: block for block in self._pool.blocks[num_kv_blocks:]}
        for block in list(self._tail.values()):
            if _is_empty(block):
                self._fence(block)
        self._balance()
        self._hook_free()

    def advance_shrink(self, max_copies: int) -> ShrinkProgress:
        """Rename up to `max_copies` tail blocks downwards: live ones, and cached ones worth keeping.

        Returns:
            The (source, destination) ids whose KV every rank must copy before its next forward
            pass, sources all >= the new end and destinations all below it, and how many are left.

        Raises:
            IllegalTransition: No shrink is in progress.
        """
        limit = self._require_shrink("advance_shrink")
        if (error := self._hook_error) is not None:
            self._hook_error = None
            raise error
        self._balance()
        room = min(max_copies, len(self._vacant))
        moving: list[KVCacheBlock] = []
        worthless: list[KVCacheBlock] = []
        for block in self._tail.values():
            # A block with a reuse watcher is read by somebody who knows it by its id: leave it to drain.
            watched = block.block_id in self._pool._reuse_watchers
            if block.ref_cnt == 0 and (watched or block.block_hash is None):
                worthless.append(block)
            elif watched:
                continue
            elif len(moving) < room:
                moving.append(block)
            else:
                break
        copies = []
        for block in moving:
            target = self._vacant.pop()
            assert target.block_id < limit <= block.block_id
            copies.append((block.block_id, target.block_id))
            self._exchange_ids(block, target)
        for block in worthless:
            self._fence(block)
        self._balance()
        return ShrinkProgress(copies=tuple(copies), num_live_tail=len(self._tail))

    def preempt_one(self) -> bool:
        """Preempt, as vLLM itself does, the running request that costs least to compute again.

        Of several with the same number of computed tokens the one admitted last; under priority scheduling one of
        the least urgent. The last running request stays: without progress nothing would ever be free.

        Returns:
            False: none can go.
        """
        running = self._scheduler.running
        if len(running) < 2:
            return False
        by_priority = self._scheduler.policy == SchedulingPolicy.PRIORITY
        victim = min(
            reversed(running), key=lambda r: (-r.priority if by_priority else 0, r.num_computed_tokens)
        )
        self.send_back(victim)
        self.on_forced_preemption(victim)
        return True

    def send_back(self, request: Any) -> None:
        """Preempt a running request, as vLLM itself does: it waits at the head of the queue."""
        self._scheduler.running.remove(request)
        self.before_forced_preemption(request)
        # Past our own override: it counts what vLLM preempts, which the policy takes for a lack of memory.
        Scheduler._preempt_request(self._scheduler, request, time.monotonic(), drop_stale_output=True)
        self._scheduler.prev_step_scheduled_req_ids.discard(request.request_id)  # as in Scheduler.reset_prefix_cache

    def discard_contents(self) -> None:
        """Let nobody read what the blocks hold: as after new weights, vLLM preempts what runs and forgets its prefixes.

        What steps under way still sample is dropped, so that an answer goes on from the tokens that it had.

        Raises:
            RuntimeError: somebody holds blocks and does not run, as a session that waits for its next input.
        """
        self.is_discarding = True
        try:
            if not self._scheduler.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("vLLM has not reset its prefix cache.")
        finally:
            self.is_discarding = False
        for request in self._scheduler.requests.values():
            if request.num_stale_output_tokens:  # preempted before: vLLM would take what it samples under way
                request.drop_stale_output = True

    def finish_shrink(self) -> None:
        """Forget the fenced tail.

        Raises:
            IllegalTransition: No shrink is in progress, or blocks in use are still in the tail.
        """
        limit = self._require_shrink("finish_shrink")
        if self._tail:
            raise IllegalTransition(
                f"finish_shrink at {limit} blocks with {len(self._tail)} live or cached blocks above. "
                "Call advance_shrink until num_live_tail is 0, or cancel_shrink."
            )
        assert not self._vacant, "a vacant block that no tail block waits for"
        del self._pool.blocks[limit:]
        self._end_shrink()
        self._publish(limit)

    def cancel_shrink(self) -> None:
        """Give fenced and vacant blocks back to the scheduler. Renames already done stay (harmless).

        Raises:
            IllegalTransition: No shrink is in progress.
        """
        limit = self._require_shrink("cancel_shrink")
        fenced = [b for b in self._pool.blocks[limit:] if b.block_id not in self._tail]
        back = sorted(self._vacant, key=lambda block: block.block_id) + fenced
        self._end_shrink()
        self._offer(back)
        self._pool.num_gpu_blocks = self._published

    # ---- internals ----

    def _require_shrink(self, what: str) -> int:
        if self._limit is None:
            raise IllegalTransition(f"{what} without begin_shrink ({self._published} blocks published).")
        return self._limit

    def _end_shrink(self) -> None:
        self._limit = None
        self._tail.clear()
        self._vacant.clear()
        self._free_hook.undo()

    def _publish(self, num_kv_blocks: int) -> None:
        """Set everything in the scheduler that is derived from the number of blocks."""
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

    def _balance(self) -> None:
        """Have one vacant block below for each tail block that is not fenced.

        Too few: take the free blocks that vLLM would reuse next. Those of the tail are fenced, the others
        become vacant. Too many, because a tail block became empty and needs no copy: give some back.
        """
        pool, limit = self._pool, self._require_shrink("_balance")
        short = len(self._tail) - len(self._vacant)
        if short < 0:
            back = [self._vacant.pop() for _ in range(-short)]
            pool.free_block_queue.prepend_n(back)
            pool.num_gpu_blocks += len(back)
            return
        taken = pool.free_block_queue.popleft_n(min(short, pool.get_num_free_blocks()))
        for block in taken:
            self._empty(block)
            if block.block_id < limit:
                self._vacant.append(block)
            else:
                del self._tail[block.block_id]

    def _fence(self, block: KVCacheBlock) -> None:
        """Take a free tail block out of use."""
        self._pool.free_block_queue.remove(block)
        self._empty(block)
        del self._tail[block.block_id]

    def _empty(self, block: KVCacheBlock) -> None:
        """Forget what `block` holds: it has left the free queue, and nobody finds it any more."""
        self._pool._maybe_evict_cached_block(block)
        if self._pool._reuse_watchers:
            self._pool._notify_reuse([block])
        self._pool.num_gpu_blocks -= 1

    def _exchange_ids(self, block: KVCacheBlock, target: KVCacheBlock) -> None:
        """Give tail `block` the id of vacant `target`, which becomes fenced. Its place in the queue stays."""
        pool = self._pool
        high, low = block.block_id, target.block_id
        extra = pool.cached_block_hashes_by_block.pop(high, None)
        hashes = [h for h in (block.block_hash, *(extra or ())) if h is not None]
        lookup = pool.cached_block_hash_to_block
        hashes = [h for h in hashes if lookup.pop(h, high) is not None]

        block.block_id, target.block_id = low, high
        pool.blocks[low], pool.blocks[high] = block, target
        del self._tail[high]

        for key in hashes:
            lookup.insert(key, block)
        if extra is not None:
            pool.cached_block_hashes_by_block[low] = extra
        if pool.metrics_collector is not None:
            ages = pool.metrics_collector.block_metrics
            if (age := ages.pop(high, None)) is not None:
                ages[low] = age

    def _hook_free(self) -> None:
        """While a shrink lasts, what is freed pays first for what the shrink still lacks.

        Without it a busy scheduler could take the freed blocks again and keep the tail alive for ever.
        Undone, it is the class's method again. Under a wrapper that somebody put over it, it stays, and is inert.
        """
        self._free_hook = seams.wrap(seams.POOL_FREE, partial(partial, self._free_and_fence), on=self._pool)

    def _free_and_fence(
        self, original: Callable[..., Any], ordered_blocks: Iterable[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> None:
        blocks = list(ordered_blocks)
        original(blocks, *args, **kwargs)
        try:
            for block in blocks:
                if block.block_id in self._tail and _is_empty(block):
                    self._fence(block)
            if self._limit is not None:
                self._balance()
        except Exception as e:  # not vLLM's affair: whoever drives the shrink hears of it
            self._hook_error = self._hook_error or e
