"""A KV cache's memory on a device: reserved addresses, and pages that go back and forth between arenas.

Weights and KV blocks each have an arena, with one pool of pages between them: what one gives back, the other may take.
No page is created or destroyed while serving; a page changes owner by being unmapped here and mapped there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from itertools import chain

import torch

from kv_resize.backing import BlockPairs, check_pages, copy_rows
from kv_resize.errors import BackingError, PageError
from kv_resize.geometry import ByteRange
from kv_resize.page_allocator import Page, PageAllocator

logger = logging.getLogger(__name__)


class PagePool:
    """Pages that no arena maps. Filled before serving, at the moments when it is known how many there must be."""

    def __init__(self, allocator: PageAllocator, num_pages: int = 0) -> None:
        """Create the first `num_pages`.

        Raises:
            BackingError: The device does not have them.
        """
        self.allocator = allocator
        self.num_pages = 0  # that there are, whoever has them
        self._free: list[Page] = []
        self.create(num_pages)

    def create(self, num_pages: int) -> None:
        """Create new pages: all of them or none.

        Raises:
            BackingError: The device does not have them; `available_bytes` says what it had. Those that were made are
                destroyed, so that what else runs on the device has memory. One that the page allocator does not destroy
                stays in the pool.
        """
        page_bytes = self.allocator.granularity_bytes
        made: list[Page] = []
        try:
            for _ in range(num_pages):
                made.append(self.allocator.create())
        except PageError as e:
            num_made = len(made)
            self._destroy(made)
            raise BackingError(
                f"cannot create {num_pages} pages of {page_bytes:,} B, {num_made} could be made: {e}",
                available_bytes=num_made * page_bytes,
            ) from e
        self._free += made
        self.num_pages += num_pages

    @property
    def num_free(self) -> int:
        """Pages an arena could take now."""
        return len(self._free)

    def take(self, num_pages: int) -> list[Page]:
        """Take pages that no arena maps: all of them or none.

        Raises:
            BackingError: Fewer are free.
        """
        if num_pages > len(self._free):
            page_bytes = self.allocator.granularity_bytes
            raise BackingError(
                f"{num_pages} pages of {page_bytes:,} B wanted, {len(self._free)} are free. Release some elsewhere.",
                available_bytes=len(self._free) * page_bytes,
            )
        taken = self._free[len(self._free) - num_pages :]
        del self._free[len(self._free) - num_pages :]
        return taken

    def give(self, pages: Sequence[Page]) -> None:
        """Take back pages that are mapped nowhere any more."""
        self._free += pages

    def _destroy(self, pages: Sequence[Page]) -> None:
        for page in pages:
            try:
                self.allocator.destroy(page)
            except PageError as e:
                logger.warning("morphserve: a page stays in the pool: %s", e)
                self._free.append(page)
                self.num_pages += 1


class ArenaBacking:
    """A `Backing` on a page allocator.

    1. Every page is in the pool or mapped in one arena, whatever call of the page allocator fails.
    2. A `populate` that raises has changed nothing.
    3. Populated pages are zero: a recycled one would hold another arena's bytes, which may read as NaN. With
       `clears=False` they hold anything: for an owner that overwrites them before it reads, as weights are.
    4. Pages are unmapped only when the work queued before is done.
    """

    def __init__(self, pool: PagePool, size_bytes: int, clears: bool = True) -> None:
        """Reserve addresses for `size_bytes`, rounded up to whole pages.

        Args:
            pool: Where pages come from and go to.
            size_bytes: Length of the buffer.
            clears: Zero what becomes populated. An `ElasticCache` needs it.

        Raises:
            PageError: The device refuses the address range.
        """
        self.page_bytes = pool.allocator.granularity_bytes
        self.size_bytes = size_bytes
        self._pool, self._allocator, self._clears = pool, pool.allocator, clears
        self._reserved_bytes = -(-size_bytes // self.page_bytes) * self.page_bytes
        self._address = self._allocator.reserve(self._reserved_bytes)
        self._whole = self._allocator.view(self._address, self._reserved_bytes)
        self._held: dict[int, Page] = {}  # page number in the range -> page that is mapped there
        self._usable: set[int] = set()  # of these, the accessible ones, zeroed where this clears

    @property
    def buffer(self) -> torch.Tensor:
        """int8 [size_bytes]."""
        return self._whole[: self.size_bytes]

    def populate(self, ranges: Sequence[ByteRange]) -> None:
        """Map pages from the pool where there are none.

        Raises:
            BackingError: The pool has too few, or the page allocator refused. Nothing has changed.
        """
        new = sorted(number for number in self._numbers(ranges) if number not in self._usable)
        missing = [number for number in new if number not in self._held]
        taken = self._pool.take(len(missing))
        try:
            for number in missing:
                self._allocator.map(self._at(number), taken[-1])
                self._held[number] = taken.pop()
            for first, end in _runs(new):
                self._allocator.set_access(self._at(first), (end - first) * self.page_bytes)
        except PageError as e:
            self._pool.give(taken)
            mapped = [number for number in missing if number in self._held]
            with contextlib.suppress(PageError):  # nothing reads these yet, but a page allocator need not know that
                self._allocator.wait()
            self._unmap(mapped)
            raise BackingError(f"no memory mapped for {len(new)} pages: {e}") from e
        if self._clears:
            for first, end in _runs(new):
                self._whole[first * self.page_bytes : end * self.page_bytes].zero_()
        self._usable.update(new)

    def release(self, ranges: Sequence[ByteRange]) -> None:
        """Give pages to the pool. One that the page allocator does not let go stays mapped here, unused."""
        numbers = [number for number in self._numbers(ranges) if number in self._held]
        if not numbers:
            return
        try:
            self._allocator.wait()
        except PageError as e:  # work may still touch them, so they cannot go elsewhere
            logger.warning("morphserve: %d pages cannot be given back: %s", len(numbers), e)
            self._usable.difference_update(numbers)
        else:
            self._unmap(numbers)

    def resident_bytes(self, ranges: Sequence[ByteRange]) -> int:
        """Return the bytes of mapped pages."""
        return sum(number in self._held for number in self._numbers(ranges)) * self.page_bytes

    def zero(self, ranges: Sequence[ByteRange]) -> None:
        for start, end in ranges:
            self._check_usable(start, end)
            self._whole[start:end].zero_()

    def copy_rows(self, offset: int, stride: int, pairs: BlockPairs) -> None:
        edges = [(offset + row * stride, offset + (row + 1) * stride) for row in set(chain.from_iterable(pairs))]
        page = self.page_bytes
        missing = {n for start, end in edges for n in range(start // page, -(-end // page))} - self._usable
        for number in missing:
            self._check_usable(number * page, (number + 1) * page)
        copy_rows(self.buffer, offset, stride, pairs)

    def _unmap(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._usable.discard(number)
            try:
                self._allocator.unmap(self._at(number))
            except PageError as e:
                logger.warning("morphserve: a page cannot be given back: %s", e)
            else:
                self._pool.give([self._held.pop(number)])

    def _at(self, number: int) -> int:
        return self._address + number * self.page_bytes

    def _numbers(self, ranges: Sequence[ByteRange]) -> list[int]:
        check_pages(ranges, self.page_bytes, self._reserved_bytes)
        page = self.page_bytes
        # Two ranges may meet in a page.
        return list(dict.fromkeys(n for start, end in ranges for n in range(start // page, end // page)))

    def _check_usable(self, start: int, end: int) -> None:
        for number in range(start // self.page_bytes, -(-end // self.page_bytes)):
            if number not in self._usable:
                raise BackingError(f"bytes [{start}, {end}) touch page {number}, which is not populated.")


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Join consecutive numbers to [first, end): one call a run, since access is what costs."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
