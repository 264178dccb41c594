"""Where the bytes of each KV block lie, and which memory pages they need. Integers only.

A cache is a set of equal *runs*: in a run, block `b` occupies the bytes
`[offset + b * block_stride, offset + (b + 1) * block_stride)`. A layer-outermost layout (vLLM's LBHNC and
LBNHC) has one run per layer; a block-outermost one (BLHNC, BLNHC, BHLNC) has a single run, whose stride
covers all layers of a block.

    layer-outermost   | layer 0: b0 b1 b2 .. | layer 1: b0 b1 b2 .. |     runs = layers
    block-outermost   | b0: l0 l1 .. | b1: l0 l1 .. | b2: ..              runs = 1
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ByteRange = tuple[int, int]  # [start, end) in the backing buffer


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of the buffer in which consecutive blocks are adjacent."""

    offset: int  # byte of block 0
    block_stride: int  # bytes per block in this run


@dataclass(frozen=True, slots=True)
class Placement:
    """A group of same-shaped layers: layer `l` of block `b` starts at `offset + l*layer_stride + b*block_stride`."""

    num_layers: int
    layer_stride: int  # bytes
    block_stride: int  # bytes
    offset: int = 0  # bytes


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The byte layout of a KV cache built for `max_num_blocks` blocks.

    Ranges ascend and are disjoint. `populate` ranges are rounded outwards, so that they
    cover every byte; `release` ranges are rounded inwards, so that no page with a byte of a live block,
    or of anything that is not a block of this cache, is in them.
    """

    runs: tuple[Run, ...]  # ascending by offset, not overlapping
    max_num_blocks: int
    size_bytes: int  # of the backing buffer
    page_bytes: int  # granularity of populate and release

    def __post_init__(self) -> None:
        if self.max_num_blocks < 1 or self.page_bytes < 1 or not self.runs:
            raise ValueError(
                f"geometry of {self.max_num_blocks} blocks, {len(self.runs)} runs and pages of "
                f"{self.page_bytes} B: each must be at least 1."
            )
        end = 0
        for run in self.runs:
            if run.block_stride < 1 or run.offset < end:
                raise ValueError(
                    f"run at byte {run.offset} with stride {run.block_stride} overlaps the run that ends at "
                    f"{end}, or is empty. Runs must be disjoint and ascending."
                )
            end = run.offset + run.block_stride * self.max_num_blocks
        if end > self.size_bytes:
            raise ValueError(f"blocks end at byte {end}, the buffer has {self.size_bytes} B.")

    @classmethod
    def layer_outermost(
        cls, num_layers: int, block_bytes_per_layer: int, max_num_blocks: int, page_bytes: int
    ) -> KVGeometry:
        """Lay out one contiguous region per layer, layers back to back (LBHNC, LBNHC)."""
        stride = block_bytes_per_layer * max_num_blocks
        layers = Placement(num_layers, layer_stride=stride, block_stride=block_bytes_per_layer)
        return cls.from_placements([layers], max_num_blocks, stride * num_layers, page_bytes)

    @classmethod
    def from_placements(
        cls, placements: Iterable[Placement], max_num_blocks: int, size_bytes: int, page_bytes: int
    ) -> KVGeometry:
        """Read the strides of vLLM's `KVCacheTensor`s, which share one buffer of `size_bytes`.

        Raises:
            ValueError: Blocks overlap, do not fit, or are neither layer- nor block-outermost (a head
                outside the block, LHBNC).
        """
        runs: set[Run] = set()
        for p in placements:
            if p.block_stride >= p.layer_stride * p.num_layers:
                # Block-outermost. Several tensors may share each packed block: the same run.
                runs.add(Run(p.offset // p.block_stride * p.block_stride, p.block_stride))
            elif p.layer_stride >= p.block_stride * max_num_blocks:
                runs |= {Run(p.offset + i * p.layer_stride, p.block_stride) for i in range(p.num_layers)}
            else:
                raise ValueError(
                    f"layer stride {p.layer_stride} B and block stride {p.block_stride} B for "
                    f"{max_num_blocks} blocks of {p.num_layers} layers: blocks are neither layer- nor "
                    "block-outermost. Set VLLM_KV_CACHE_LAYOUT to LBHNC or BLHNC."
                )
        ordered = tuple(sorted(runs, key=lambda run: run.offset))
        return cls(ordered, max_num_blocks, size_bytes, page_bytes)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return sum(run.block_stride for run in self.runs)

    def byte_ranges(self, first: int, end: int) -> list[ByteRange]:
        """Return the exact bytes of blocks `[first, end)`."""
        self._check(first, end)
        return _merge((r.offset + first * r.block_stride, r.offset + end * r.block_stride) for r in self.runs)

    def populate_ranges(self, first: int, end: int) -> list[ByteRange]:
        """Return the whole pages that cover every byte of blocks `[first, end)`."""
        page = self.page_bytes
        return _merge((_down(a, page), _up(b, page)) for a, b in self.byte_ranges(first, end))

    def release_ranges(self, num_live: int, num_mapped: int) -> list[ByteRange]:
        """Return the whole pages that only blocks `[num_live, num_mapped)` and dead ones after them occupy.

        Blocks from `num_live` on are dead, so the page in which block `num_mapped` begins goes too,
        unless something other than this run's blocks lies in it.
        """
        self._check(num_live, num_mapped)
        page = self.page_bytes
        ranges = []
        for r in self.runs:
            start = _up(r.offset + num_live * r.block_stride, page)
            run_end = r.offset + self.max_num_blocks * r.block_stride
            # Past the last byte of the buffer a page holds nothing else.
            whole_end = _up(run_end, page) if run_end == self.size_bytes else _down(run_end, page)
            ranges.append((start, min(_up(r.offset + num_mapped * r.block_stride, page), whole_end)))
        return _merge(ranges)

    def fringe_ranges(self, first: int, end: int) -> list[ByteRange]:
        """Return the bytes of blocks `[first, end)` in pages that may also hold other bytes.

        Such a page was perhaps never released, so populating it again does not zero it.
        """
        page = self.page_bytes
        ranges: list[ByteRange] = []
        for r in self.runs:
            a, b = r.offset + first * r.block_stride, r.offset + end * r.block_stride
            ranges += [(a, min(_up(a, page), b)), (max(_down(b, page), a), b)]
        self._check(first, end)
        return _merge(ranges)

    def _check(self, first: int, end: int) -> None:
        if not 0 <= first <= end <= self.max_num_blocks:
            raise ValueError(
                f"blocks [{first}, {end}) of a cache of {self.max_num_blocks}: not an ascending range in it."
            )


def total(ranges: Iterable[ByteRange]) -> int:
    """Return the bytes in disjoint ranges."""
    return sum(end - start for start, end in ranges)


def _down(value: int, page: int) -> int:
    return value // page * page


def _up(value: int, page: int) -> int:
    return -(-value // page) * page


def _merge(ranges: Iterable[ByteRange]) -> list[ByteRange]:
    """Drop empty ranges, join those that overlap; touching ones stay apart: only its ends may meet populated pages."""
    merged: list[ByteRange] = []
    for start, end in sorted(r for r in ranges if r[0] < r[1]):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged
