"""A backing that keeps books only, and refuses what real memory would silently allow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from kv_resize import BackingError, ByteRange
from kv_resize.backing import BlockPairs, check_pages, copy_rows


class FakeBacking:
    """Bookkeeping in place of memory, with a limit that can be made to run out.

    Refuses: touching a page that is not populated, populating a page twice, releasing one that is not
    populated. The first and last page of a range may be shared with a neighbour and are exempt from
    the second rule; after a populate that failed, the next release is exempt from the third. Released
    pages are overwritten, so reading what was released shows.
    """

    POISON = 0x55

    def __init__(self, size_bytes: int, page_bytes: int = 4096, limit_bytes: int | None = None) -> None:
        """`limit_bytes`: populate fails beyond this much resident memory; None = never."""
        self.page_bytes = page_bytes
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes
        self._num_pages = -(-size_bytes // page_bytes)
        self._resident: set[int] = set()
        self._failed = False
        self._buffer = torch.full((size_bytes,), self.POISON, dtype=torch.int8)

    @property
    def buffer(self) -> torch.Tensor:
        """int8 [size_bytes]."""
        return self._buffer

    def populate(self, ranges: Sequence[ByteRange]) -> None:
        """Mark pages resident and zero them, up to the limit."""
        for pages in map(self._pages, ranges):
            for page in pages[1:-1]:
                if page in self._resident:
                    raise BackingError(f"page {page} is populated already. Release it first.")
            for page in pages:
                if page in self._resident:
                    continue
                if self.limit_bytes is not None and self._bytes() + self.page_bytes > self.limit_bytes:
                    self._failed = True
                    raise BackingError(f"no memory: {self._bytes():,} B of {self.limit_bytes:,} B in use.")
                self._resident.add(page)
                self._fill(page, 0)

    def release(self, ranges: Sequence[ByteRange]) -> None:
        """Forget pages and their contents."""
        for pages in map(self._pages, ranges):
            for page in pages:
                if page not in self._resident:
                    if self._failed:
                        continue
                    raise BackingError(f"page {page} is not populated. It was released before.")
                self._resident.remove(page)
                self._fill(page, self.POISON)
        self._failed = False

    def resident_bytes(self, ranges: Sequence[ByteRange]) -> int:
        """Bytes of populated pages."""
        return sum(page in self._resident for r in ranges for page in self._pages(r)) * self.page_bytes

    def zero(self, ranges: Sequence[ByteRange]) -> None:
        """Overwrite populated bytes with zero."""
        for start, end in ranges:
            self._touch(start, end)
            self._buffer[start:end].zero_()

    def copy_rows(self, offset: int, stride: int, pairs: BlockPairs) -> None:
        """Copy rows, all of which must be populated."""
        for row in itertools.chain.from_iterable(pairs):
            self._touch(offset + row * stride, offset + (row + 1) * stride)
        copy_rows(self._buffer, offset, stride, pairs)

    def _touch(self, start: int, end: int) -> None:
        for page in range(start // self.page_bytes, -(-end // self.page_bytes)):
            if page not in self._resident:
                raise BackingError(f"bytes [{start}, {end}) touch page {page}, which is not populated.")

    def _bytes(self) -> int:
        return len(self._resident) * self.page_bytes

    def _fill(self, page: int, value: int) -> None:
        self._buffer[page * self.page_bytes : (page + 1) * self.page_bytes].fill_(value)

    def _pages(self, byte_range: ByteRange) -> range:
        check_pages([byte_range], self.page_bytes, self._num_pages * self.page_bytes)
        return range(byte_range[0] // self.page_bytes, byte_range[1] // self.page_bytes)
