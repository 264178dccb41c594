"""Keeps KV that quantized layers wrote out of the prefix cache of level 0.

vLLM's block hashes cover tokens, not the weights that computed the KV. While the level is above 0 the
prefix cache is used as ever and newly cached blocks are remembered. Back at level 0 their hashes are
dropped, and requests that still carry such KV in their context cache nothing more until they end: what
they compute now depends on it. So a request that starts at level 0 never reads degraded KV.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock

_PRUNE_AT = 4096  # remembered blocks before the first look for stale ones


def requests_with_kv(scheduler: Any) -> list[str]:
    """Ids of the requests that hold KV blocks now, the argument of `Provenance.taint`. O(running)."""
    manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    return list(manager.req_to_blocks)


class Provenance:
    """Which cached blocks and which requests carry KV of a level above 0.

    The scheduler hook calls, between two `schedule()` calls:

    * leaving level 0: `set_level(k)` and `taint(requests_with_kv(scheduler))` before the first step
      that runs with any quantized layer;
    * returning to level 0: `taint(requests_with_kv(scheduler))` and `set_level(0)` when every layer of
      the next step is at full precision;
    * `forget(request_id)` when a request ends, however it ends.

    Cost: O(1) per cached block while the level is above 0, one set lookup per call at level 0.
    """

    def __init__(self, pool: BlockPool) -> None:
        """Wrap the two methods by which vLLM adds to the prefix cache, on this pool only."""
        self._pool = pool
        self._level = 0
        self._tainted: set[str] = set()
        # By identity: a block may be renamed meanwhile, and KVCacheBlock is not hashable.
        self._degraded: dict[int, KVCacheBlock] = {}
        self._prune_at = _PRUNE_AT
        self._cache_full = pool.cache_full_blocks
        self._cache_partial = pool.cache_partial_block
        self._wrappers = {
            "cache_full_blocks": self._cache_full_blocks,
            "cache_partial_block": self._cache_partial_block,
        }
        for name, wrapper in self._wrappers.items():
            setattr(pool, name, wrapper)

    @property
    def level(self) -> int:
        """The level the next step runs at, as last set."""
        return self._level

    @property
    def num_degraded_blocks(self) -> int:
        """Blocks remembered as cached with KV of a level above 0; 0 at level 0."""
        return len(self._degraded)

    def is_tainted(self, request_id: str) -> bool:
        """Whether this request's context holds KV of a level above 0."""
        return request_id in self._tainted

    def taint(self, request_ids: Iterable[str]) -> None:
        """These requests hold KV and run, or may have run, at a level above 0."""
        self._tainted.update(request_ids)

    def forget(self, request_id: str) -> None:
        """The request has ended. Unknown ids are fine."""
        self._tainted.discard(request_id)

    def set_level(self, level: int) -> None:
        """The level of the next step. 0 drops every degraded block from the prefix cache."""
        self._level = level
        if level > 0:
            return
        for block in self._degraded.values():
            # Without a hash it was evicted, perhaps fenced and forgotten: its id may be another's now.
            if block.block_hash is not None:
                self._pool._maybe_evict_cached_block(block)
        self._degraded.clear()

    def uninstall(self) -> None:
        """Leave the pool as found."""
        for name, wrapper in self._wrappers.items():
            if self._pool.__dict__.get(name) == wrapper:
                delattr(self._pool, name)

    # ---- call-through wrappers ----

    def _may_cache(self, request: Any) -> bool:
        """Settle the request's taint; False if it must not add to the prefix cache."""
        request_id = request.request_id
        if self._level > 0:
            self._tainted.add(request_id)
            return True
        if request_id not in self._tainted:
            return True
        if request.num_computed_tokens == 0:
            # Preempted and starting over: its blocks are prefix hits (clean at level 0) or will be
            # computed in this step.
            self._tainted.discard(request_id)
            return True
        return False

    def _remember(self, block: KVCacheBlock) -> None:
        if self._level > 0 and block.block_hash is not None:
            self._degraded[id(block)] = block
            if len(self._degraded) > self._prune_at:
                self._prune()

    def _prune(self) -> None:
        """Forget blocks that have lost their hash. Doubling the mark keeps it O(1) per remembered block."""
        self._degraded = {key: b for key, b in self._degraded.items() if b.block_hash is not None}
        self._prune_at = max(_PRUNE_AT, 2 * len(self._degraded))

    def _cache_full_blocks(
        self,
        request: Any,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if not self._may_cache(request):
            return  # the caller counts these blocks as cached and does not come back to them
        self._cache_full(request, blocks, num_cached_blocks, num_full_blocks, *args, **kwargs)
        if self._level > 0:
            for block in blocks[num_cached_blocks:num_full_blocks]:
                self._remember(block)

    def _cache_partial_block(
        self, request: Any, block: KVCacheBlock, *args: Any, **kwargs: Any
    ) -> BlockHashWithGroupId | None:
        if not self._may_cache(request):
            return None
        key = self._cache_partial(request, block, *args, **kwargs)
        self._remember(block)
        return key
