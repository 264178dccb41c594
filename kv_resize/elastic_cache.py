"""A KV cache whose address range is fixed and whose memory follows the number of mapped blocks."""

from __future__ import annotations

import contextlib
from bisect import bisect_left

import torch

from kv_resize.backing import Backing, BlockPairs
from kv_resize.errors import BackingError, KVResizeError, MapError
from kv_resize.geometry import KVGeometry, total


class ElasticCache:
    """A KV cache of which blocks `[0, num_mapped)` are backed by memory; the rest of the buffer is address space.

    1. A block is zero when it becomes mapped.
    2. A call that raises has changed nothing.
    3. `unmap` never touches a byte of a block that stays mapped.
    """

    def __init__(self, backing: Backing, geometry: KVGeometry, num_blocks: int) -> None:
        """Map the first `num_blocks` blocks of a backing nobody has populated.

        Raises:
            KVResizeError: Backing and geometry do not belong together.
            MapError: Not enough memory.
        """
        if backing.size_bytes < geometry.size_bytes or backing.page_bytes != geometry.page_bytes:
            raise KVResizeError(
                f"a backing of {backing.size_bytes} B in pages of {backing.page_bytes} B for a geometry of "
                f"{geometry.size_bytes} B in pages of {geometry.page_bytes} B. Build both for one cache."
            )
        self.backing = backing
        self.geometry = geometry
        self._num_mapped = 0
        self.map(num_blocks)

    @property
    def buffer(self) -> torch.Tensor:
        """int8 [size_bytes]; vLLM's per-layer views are made on this."""
        return self.backing.buffer

    @property
    def num_mapped(self) -> int:
        """Mapped blocks, null block included."""
        return self._num_mapped

    @property
    def max_num_blocks(self) -> int:
        """Blocks the address range holds."""
        return self.geometry.max_num_blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.geometry.block_bytes

    @property
    def mapped_bytes(self) -> int:
        """Memory the mapped blocks need, in whole pages."""
        return total(self.geometry.populate_ranges(0, self._num_mapped))

    def resident_bytes(self) -> int:
        """Return the memory that the whole buffer takes up now, asked of the system."""
        return self.backing.resident_bytes(self.geometry.populate_ranges(0, self.max_num_blocks))

    def map(self, num_blocks: int) -> None:
        """Map blocks up to `num_blocks`, zeroed.

        Raises:
            KVResizeError: Fewer than are mapped, or more than the address range holds.
            MapError: Not enough memory; nothing has changed.
        """
        old = self._num_mapped
        if not old <= num_blocks <= self.max_num_blocks:
            raise KVResizeError(
                f"map {num_blocks} blocks: {old} are mapped and the address range holds "
                f"{self.max_num_blocks}. Use unmap to shrink."
            )
        wanted = self.geometry.populate_ranges(old, num_blocks)
        try:
            self.backing.populate(wanted)
        except BackingError as e:
            ours = self.geometry.release_ranges(old, num_blocks)  # none of it was resident
            if e.available_bytes is None:
                possible = old + self.backing.resident_bytes(ours) // self.block_bytes
            self.backing.release(ours)
            if e.available_bytes is not None:
                possible = self._num_possible(num_blocks, e.available_bytes)
            raise MapError(num_blocks, old, possible, str(e)) from e
        self.backing.zero(self.geometry.fringe_ranges(old, num_blocks))
        self._num_mapped = num_blocks

    def map_at_most(self, num_blocks: int) -> str:
        """Map blocks up to `num_blocks`, zeroed, or as many as there is memory for. Never raises.

        Returns:
            Why it is not all of them; empty if it is.
        """
        if num_blocks <= self._num_mapped:
            return ""
        try:
            self.map(num_blocks)
        except MapError as e:
            if e.num_possible > self._num_mapped:
                with contextlib.suppress(KVResizeError, RuntimeError):
                    self.map(e.num_possible)
            return str(e)
        except (KVResizeError, RuntimeError) as e:  # torch says RuntimeError when it is out of memory
            return str(e)
        return ""

    def _num_possible(self, num_blocks: int, available_bytes: int) -> int:
        """Return the most blocks, below `num_blocks`, whose missing pages `available_bytes` pay for.

        Behind the last mapped block nothing is resident but the rest of its pages: one block more tells those.
        """
        old, pages_of = self._num_mapped, self.geometry.populate_ranges
        paid_bytes = available_bytes + self.backing.resident_bytes(pages_of(old, old + 1))
        counts = range(old, num_blocks)
        return counts[bisect_left(counts, True, key=lambda count: total(pages_of(old, count)) > paid_bytes) - 1]

    def forget(self) -> None:
        """Give back whatever memory there is behind blocks that are not mapped: somebody wrote to them."""
        self.backing.release(self.geometry.release_ranges(self._num_mapped, self.max_num_blocks))

    def unmap(self, num_blocks: int) -> None:
        """Give back the memory of blocks from `num_blocks` on.

        Raises:
            KVResizeError: More than are mapped, or none at all would be left.
        """
        if not 1 <= num_blocks <= self._num_mapped:
            raise KVResizeError(
                f"unmap down to {num_blocks} blocks, {self._num_mapped} are mapped. Keep at least the null "
                "block, and use map to grow."
            )
        self.backing.release(self.geometry.release_ranges(num_blocks, self._num_mapped))
        self._num_mapped = num_blocks

    def copy(self, pairs: BlockPairs) -> None:
        """Copy block src to block dst over all layers, for each (src, dst).

        Raises:
            KVResizeError: A block is not mapped, is written twice, or is both source and destination.
        """
        if not pairs:
            return
        sources, destinations = zip(*pairs, strict=True)
        written = set(destinations)
        if len(written) != len(pairs) or not written.isdisjoint(sources):
            raise KVResizeError(
                f"copy of {len(pairs)} blocks: a destination occurs twice or is a source too. "
                "The order of copies is not defined; make the sets disjoint."
            )
        low, high = min(*sources, *destinations), max(*sources, *destinations)
        if low < 0 or high >= self._num_mapped:
            raise KVResizeError(
                f"copy touches blocks {low} to {high}, {self._num_mapped} are mapped. Copy before unmap."
            )
        for run in self.geometry.runs:
            self.backing.copy_rows(run.offset, run.block_stride, pairs)
