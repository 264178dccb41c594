"""One rank's KV cache: laid out for the deepest level, resident only up to what is published.

vLLM allocates all layers in one buffer with torch.zeros, which touches every page
(vllm/v1/worker/utils.py, allocate_kv_cache). For the duration of that call torch.zeros yields our reserved
mapping instead, through torch's own interposition (TorchFunctionMode).
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from kv_resize import ElasticCache, HostBacking, KVGeometry, KVResizeError, MapError, Placement

logger = logging.getLogger("vllm.morphserve")


class _ZerosFrom(TorchFunctionMode):
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

    def in_place_of_zeros(self) -> _ZerosFrom:
        """Context in which vLLM's allocation gets our buffer."""
        return _ZerosFrom(self._backing.buffer)

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
        if num_blocks <= self._cache.num_mapped:
            return
        try:
            self._cache.map(num_blocks)
        except MapError as e:
            logger.warning("morphserve: %s", e)
            if e.num_possible > self._cache.num_mapped:
                with contextlib.suppress(KVResizeError, RuntimeError):
                    self._cache.map(e.num_possible)
        except (KVResizeError, RuntimeError) as e:  # torch says RuntimeError when it is out of memory
            logger.warning("morphserve: no more KV blocks: %s", e)

    def unmap(self, num_blocks: int) -> None:
        """Return the memory of blocks from `num_blocks` on."""
        if num_blocks < self._cache.num_mapped:
            self._cache.unmap(num_blocks)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """KV of block `source` to block `destination`, all layers."""
        self._cache.copy(pairs)

    def rewrite_block_tables(self, runner: Any, pairs: Sequence[tuple[int, int]]) -> None:
        """Rename blocks in everything the model runner caches between steps.

        V1 runner: `requests[*].block_ids` and the rows of `input_batch.block_table`
        (vllm/v1/worker/gpu_model_runner.py, block_table.py). The CPU platform has no V2 runner.
        """
        renamed = dict(pairs)
        for state in runner.requests.values():
            for ids in state.block_ids:
                for i, block in enumerate(ids):
                    if block in renamed:
                        ids[i] = renamed[block]
        lookup: np.ndarray | None = None
        for table in runner.input_batch.block_table.block_tables:
            rows = table.block_table.np
            if lookup is None:
                lookup = np.arange(self._num_blocks, dtype=rows.dtype)
                for source, destination in pairs:
                    lookup[source] = destination
            rows[:] = lookup[rows]
