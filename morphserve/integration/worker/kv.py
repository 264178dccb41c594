"""One rank's KV cache: laid out for the deepest level, resident only up to what is published.

vLLM allocates all layers in one buffer with torch.zeros, which touches every page
(vllm/v1/worker/utils.py, allocate_kv_cache). For the duration of that call torch.zeros yields our reserved
mapping instead, through torch's own interposition (TorchFunctionMode).
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from kv_resize import ElasticCache, HostBacking, KVGeometry, Placement
from morphserve.integration.worker.block_tables import rewrite_block_tables

logger = logging.getLogger("vllm.morphserve")


class ZerosFrom(TorchFunctionMode):
    """The first torch.zeros of exactly `buffer.numel()` int8 elements returns `buffer`."""

    def __init__(self, buffer: torch.Tensor) -> None:
        super().__init__()
        self._buffer = buffer
        self.used = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (
            func is torch.zeros
            and not self.used
            and args == (self._buffer.numel(),)
            and kwargs.get("dtype") is torch.int8
        ):
            self.used = True
            return self._buffer
        return func(*args, **kwargs)

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        if exc[0] is None and not self.used:
            raise RuntimeError(
                "vLLM did not allocate the KV cache with one torch.zeros of int8: the seam kv_alloc has moved"
            )


class RankKV:
    """Grow, shrink and copy blocks of this rank's cache."""

    def __init__(self, kv_cache_config: Any) -> None:
        tensors = kv_cache_config.kv_cache_tensors
        self._num_blocks = kv_cache_config.num_blocks
        self._backing = HostBacking(tensors[0].size)
        geometry = KVGeometry.from_placements(
            [Placement(len(t.layers), t.layer_stride, t.block_stride, t.offset) for t in tensors],
            self._num_blocks,
            tensors[0].size,
            mmap.PAGESIZE,
        )
        self._cache = ElasticCache(self._backing, geometry, num_blocks=0)

    def in_place_of_zeros(self) -> ZerosFrom:
        """Context in which vLLM's allocation gets our buffer."""
        return ZerosFrom(self._backing.buffer)

    @property
    def num_mapped(self) -> int:
        """Blocks that are backed by memory, null block included."""
        return self._cache.num_mapped

    @property
    def mapped_bytes(self) -> int:
        return self._cache.mapped_bytes

    @property
    def resident_bytes(self) -> int:
        """What the kernel says is resident of this cache."""
        return self._cache.resident_bytes()

    def keep_free(self, num_bytes: int, num_sharers: int) -> None:
        """Map nothing that would leave less memory than this on the host, where so many ranks map at once."""
        self._backing.keep_free_bytes, self._backing.num_sharers = num_bytes, num_sharers

    def start(self, num_blocks: int) -> None:
        """Forget what vLLM's warm-up wrote anywhere in the range, then back the first `num_blocks`."""
        if self._cache.num_mapped == 0:
            geometry = self._cache.geometry
            self._backing.release(geometry.release_ranges(0, geometry.max_num_blocks))
            self._cache.map(num_blocks)

    def map(self, num_blocks: int) -> None:
        """Back blocks up to `num_blocks` with zeroed memory, or as many as the system gives.

        A commit cannot fail any more when it comes to this; the reply says how many there are, and the
        scheduler publishes no more than every rank has.
        """
        if error := self._cache.map_at_most(num_blocks):
            logger.warning("morphserve: no more KV blocks: %s", error)

    def unmap(self, num_blocks: int) -> None:
        """Return the memory of blocks from `num_blocks` on."""
        if num_blocks < self._cache.num_mapped:
            self._cache.unmap(num_blocks)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """KV of block `source` to block `destination`, all layers."""
        self._cache.copy(pairs)

    def rewrite_block_tables(self, runner: Any, pairs: Sequence[tuple[int, int]]) -> None:
        """Rename blocks in everything the model runner caches between steps."""
        rewrite_block_tables(runner, pairs, self._num_blocks)
