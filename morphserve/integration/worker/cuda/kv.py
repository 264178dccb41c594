"""One rank's KV cache on a device: laid out for the deepest level, with pages for what is published."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from kv_resize import ArenaBacking, ElasticCache, KVGeometry, Placement
from morphserve.errors import ConfigError
from morphserve.integration.worker.block_tables import rewrite_block_tables
from morphserve.integration.worker.kv import ZerosFrom
from morphserve.residence import DeviceMemory

logger = logging.getLogger("vllm.morphserve")


def geometry_of(kv_cache_config: Any, page_bytes: int) -> KVGeometry:
    """Where vLLM puts the blocks.

    Raises:
        ConfigError: not every layer's blocks lie together, so that the cache has no end to grow at.
    """
    tensors = kv_cache_config.kv_cache_tensors
    placements = [Placement(len(t.layers), t.layer_stride, t.block_stride, t.offset) for t in tensors]
    try:
        return KVGeometry.from_placements(placements, kv_cache_config.num_blocks, tensors[0].size, page_bytes)
    except ValueError as e:
        layout = getattr(kv_cache_config, "kv_cache_layout", None)
        raise ConfigError(f"KV cache layout {layout}: {e}") from e


def check_kinds(kv_cache_config: Any) -> None:
    """Refuse caches whose tables keep ids of freed blocks: their pages may be gone when a kernel reads them.

    Raises:
        ConfigError: some layers look at a window only (vllm/v1/worker/gpu/block_table.py).
    """
    kinds = {type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups}
    if kinds != {"FullAttentionSpec"}:
        raise ConfigError(
            f"the KV cache is of kind {', '.join(sorted(kinds))}; on a GPU only FullAttentionSpec is supported: block "
            "tables of others keep blocks that have no pages any more. Run this model without --plugin morphserve."
        )


def quantum_of(geometry: KVGeometry) -> int:
    """Blocks that fill whole pages in every layer."""
    page = geometry.page_bytes
    return math.lcm(*(math.lcm(page, run.block_stride) // run.block_stride for run in geometry.runs))


class DeviceKV:
    """Grow, shrink and copy blocks of this rank's cache. `ElasticKV` for the background thread."""

    def __init__(self, kv_cache_config: Any, memory: DeviceMemory, base_num_blocks: int) -> None:
        """Take new memory for `base_num_blocks` blocks; all that comes later are pages that layers gave up.

        Raises:
            BackingError: the device does not have it.
        """
        geometry = geometry_of(kv_cache_config, memory.page_bytes)
        backing = ArenaBacking(memory.pool, geometry.size_bytes)
        pages = sum(end - start for start, end in geometry.populate_ranges(0, base_num_blocks)) // memory.page_bytes
        memory.release_cached()
        memory.pool.create(pages)
        self._backing = backing
        self._wait = memory.pager.wait
        self._num_blocks = kv_cache_config.num_blocks
        self._cache = ElasticCache(backing, geometry, base_num_blocks)

    def in_place_of_zeros(self) -> ZerosFrom:
        """Context in which vLLM's allocation gets our buffer."""
        return ZerosFrom(self._backing.buffer)

    @property
    def num_mapped(self) -> int:
        """Blocks that are backed by pages, null block included."""
        return self._cache.num_mapped

    @property
    def mapped_bytes(self) -> int:
        return self._cache.mapped_bytes

    def map(self, num_blocks: int) -> None:
        """Up to so many, or as many as there are pages for. The reply says how many there are."""
        if error := self._cache.map_at_most(num_blocks):
            logger.warning("morphserve: no more KV blocks: %s", error)

    def unmap(self, num_blocks: int) -> None:
        """Give the pages of blocks from `num_blocks` on back."""
        if num_blocks < self._cache.num_mapped:
            self._cache.unmap(num_blocks)

    def move(self, runner: Any, pairs: Sequence[tuple[int, int]]) -> None:
        """KV of block `source` to block `destination` in all layers, and their new names for the model runner.

        Queued behind the steps under way and before the next: all of it is the device's work, in its order.
        """
        if not hasattr(runner, "block_tables"):
            self._wait()  # V1 has its tables on the host, and a step under way may still be copying them
        self._cache.copy(pairs)
        rewrite_block_tables(runner, pairs, self._num_blocks)
