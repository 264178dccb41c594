"""One rank's KV cache: laid out for the deepest level, with memory only for what is published.

vLLM allocates all layers in one buffer with torch.zeros, which touches every page
(vllm/v1/worker/utils.py, allocate_kv_cache). For the duration of that call torch.zeros yields our reserved
addresses instead, through torch's own interposition (TorchFunctionMode).
"""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from kv_resize import KVGeometry, KVResizeError, Placement
from morphserve.errors import ConfigError
from morphserve.integration.worker.block_tables import forget_blocks, rewrite_block_tables
from morphserve.residence import Residence

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

logger = logging.getLogger("vllm.morphserve")

_MANY_ROWS = 32  # torch's index_select has a kernel of its own for up to 16


def geometry_of(kv_cache_config: KVCacheConfig, page_bytes: int) -> KVGeometry:
    """Return where vLLM puts the blocks.

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


def check_kinds(kv_cache_config: KVCacheConfig) -> None:
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


def granularity_of(geometry: KVGeometry) -> int:
    """Return how many blocks fill whole pages in every layer: so many come and go together."""
    page = geometry.page_bytes
    return math.lcm(*(math.lcm(page, run.block_stride) // run.block_stride for run in geometry.runs))


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
    """Grow, shrink and copy blocks of this rank's cache. `ElasticKV` for the background thread."""

    def __init__(self, kv_cache_config: KVCacheConfig, residence: Residence, base_num_blocks: int) -> None:
        """Lay the cache out.

        Args:
            kv_cache_config: of this rank, for the deepest level's blocks.
            residence: gives the memory.
            base_num_blocks: of level 0, null block included.

        Raises:
            BackingError: the device has no memory for level 0's blocks.
        """
        geometry = geometry_of(kv_cache_config, residence.page_bytes or mmap.PAGESIZE)
        self._wait, self._extend = residence.wait, residence.extend_cache
        self._num_blocks = kv_cache_config.num_blocks
        self.short_of = ""  # why there was no memory for all blocks that were last asked for
        self._cache = residence.open_cache(geometry, base_num_blocks)

    def in_place_of_zeros(self) -> ZerosFrom:
        """Return the context in which vLLM's allocation gets our buffer."""
        return ZerosFrom(self._cache.buffer)

    @property
    def num_mapped(self) -> int:
        """Blocks that are backed by memory, null block included."""
        return self._cache.num_mapped

    @property
    def mapped_bytes(self) -> int:
        """Memory that the mapped blocks need, in whole pages."""
        return self._cache.mapped_bytes

    @property
    def resident_bytes(self) -> int:
        """What the system says the cache takes."""
        return self._cache.resident_bytes()

    def map(self, num_blocks: int) -> None:
        """Back blocks up to `num_blocks` with zeroed memory, or as many as there is memory for.

        A commit cannot fail any more when it comes to this; the reply says how many there are, and the
        scheduler publishes no more than every rank has.

        Raises:
            MapError: there is no memory for the first ones.
        """
        if self._cache.num_mapped == 0:
            self._cache.forget()  # what vLLM's warm-up wrote, anywhere in the range
            self._cache.map(num_blocks)  # all of them: nothing can be served with less than level 0's
            return
        self.short_of = str(self._cache.map_at_most(num_blocks) or "")

    def extend(self, num_blocks: int) -> int:
        """Back blocks up to `num_blocks` with memory that no layer gave up; return how many are backed. Before serving.

        Where the device does not have it, all stays as it is.
        """
        if num_blocks <= self.num_mapped:  # as on a rank that had room for more than another
            return self.num_mapped
        try:
            self._extend(self._cache, num_blocks)
        except KVResizeError as e:
            logger.warning("morphserve: no more than %d KV blocks at level 0: %s", self.num_mapped, e)
        return self.num_mapped

    def unmap(self, num_blocks: int) -> None:
        """Give back the memory of blocks from `num_blocks` on."""
        if num_blocks < self._cache.num_mapped:
            self._cache.unmap(num_blocks)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV of block `source` to block `destination`, all layers."""
        self._cache.copy(pairs)

    def rewrite_block_tables(self, runner: GPUModelRunner, pairs: Sequence[tuple[int, int]]) -> None:
        """Rename blocks in everything that the model runner caches between steps.

        Queued behind the steps under way and before the next: all of it is the device's work, in its order.
        """
        if not hasattr(runner, "block_tables"):
            self._wait()  # V1 has its tables on the host, and a step under way may still be copying them
        rewrite_block_tables(runner, pairs, self._num_blocks)

    def warm_up(self, runner: GPUModelRunner) -> None:
        """Do to no effect what a shrink does, while no request has blocks.

        A device loads a kernel when it is first launched: the first shrink held up a step of an H100 for 55 ms. Torch
        has other kernels for a few rows than for many.
        """
        end = self.num_mapped
        many = min(_MANY_ROWS, end // 2)
        for n in (1, many):
            self.copy([(end - 2 * n + i, end - n + i) for i in range(n)])  # of blocks that nobody has written
        self.rewrite_block_tables(runner, [(end - 2, end - 1)])
        forget_blocks(runner, self._num_blocks)

    def forget_blocks(self, runner: GPUModelRunner, num_blocks: int) -> None:
        """Let no table on a device name blocks from `num_blocks` on, where such blocks are about to go."""
        if num_blocks < self.num_mapped:
            forget_blocks(runner, num_blocks)
