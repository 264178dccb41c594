"""Device memory by the page: reserved addresses, page handles, and mappings of one handle each.

The calls are those of a driver's virtual memory management (CUDA: cuMemAddressReserve, cuMemCreate, cuMemMap,
cuMemSetAccess, cuMemUnmap, cuMemRelease). `CudaPageAllocator` makes them; `FakePageAllocator` keeps books in
place of a device and refuses what the driver would.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from kv_resize.errors import PageError

Page = int  # handle of `granularity_bytes` of device memory


class PageAllocator(Protocol):
    """Device memory by the page. A call that raises `PageError` has changed nothing. None waits for queued work."""

    granularity_bytes: int

    def reserve(self, size_bytes: int) -> int:
        """Reserve addresses in which nothing is mapped. `size_bytes` is a positive multiple of the granularity."""
        ...

    def view(self, address: int, size_bytes: int) -> torch.Tensor:
        """Return int8 [size_bytes] over a reserved range. Only what is mapped and accessible may be touched."""
        ...

    def create(self) -> Page:
        """Create one page of memory. Slow (hundreds of microseconds): before serving only."""
        ...

    def destroy(self, page: Page) -> None:
        """Give the memory of a page that is mapped nowhere back to the device. Before serving only."""
        ...

    def map(self, address: int, page: Page) -> None:
        """Put a page that is mapped nowhere at `address`, without access yet."""
        ...

    def set_access(self, address: int, size_bytes: int) -> None:
        """Allow reads and writes in a range that is mapped throughout."""
        ...

    def unmap(self, address: int) -> None:
        """Take the page that was mapped at `address` away, whole. Its bytes stay with it."""
        ...

    def wait(self) -> None:
        """Wait until all work that has been queued so far is done: only then may its pages be unmapped."""
        ...

    def fence(self) -> AbstractContextManager[None]:
        """Note what is queued now. Inside the context, `wait` in its thread waits for that alone.

        For who unmaps many pages that nothing touches which is queued later: one wait, not one for each range, behind
        steps that have only just been queued.
        """
        ...


class FakePageAllocator:
    """A page allocator that keeps the books in place of a device.

    Refuses: unaligned addresses, mapping outside of a reservation or over a mapping, mapping a page twice, unmapping
    what is not the beginning of a mapping or what queued work may still read, access to what is not mapped, more pages
    than there are. A page keeps its bytes when it moves; addresses without a page show poison.
    """

    POISON = 0x55

    def __init__(self, num_pages: int, granularity_bytes: int = 2 << 20) -> None:
        self.granularity_bytes = granularity_bytes
        self.num_pages = num_pages
        self.num_created = 0  # pages that exist
        self.busy = False  # work is queued that may touch any mapped page
        self.fail_at: int | None = None  # the call to map, set_access or unmap that fails, counted from 0
        self.num_calls = 0
        self.mapped: dict[int, Page] = {}  # address -> page
        self._in_use: set[Page] = set()  # the pages of these
        self.accessible: set[int] = set()  # addresses of mappings
        self._bytes: dict[Page, torch.Tensor] = {}
        self._ranges: list[tuple[int, torch.Tensor]] = []
        self._next = granularity_bytes << 20
        self._last_page = 0

    def reserve(self, size_bytes: int) -> int:
        """Reserve a new range, with unused addresses behind it."""
        self._check_size(size_bytes)
        address, self._next = self._next, self._next + size_bytes + self.granularity_bytes
        self._ranges.append((address, torch.full((size_bytes,), self.POISON, dtype=torch.int8)))
        return address

    def view(self, address: int, size_bytes: int) -> torch.Tensor:
        """Return host memory that stands for the range."""
        start, memory = self._range_of(address)
        if address + size_bytes > start + memory.numel():
            raise PageError(f"{address:#x} to {address + size_bytes:#x} lies in no reserved range.")
        return memory[address - start : address - start + size_bytes]

    def create(self) -> Page:
        """Create a numbered page that holds poison."""
        if self.num_created == self.num_pages:
            raise PageError(f"out of memory: all {self.num_pages} pages exist. Create fewer.")
        self.num_created += 1
        self._last_page += 1
        self._bytes[self._last_page] = torch.full((self.granularity_bytes,), self.POISON, dtype=torch.int8)
        return self._last_page

    def destroy(self, page: Page) -> None:
        """Destroy a page; its number is not used again."""
        self._check_page("destroy", page)
        if page in self._in_use:
            raise PageError(f"destroy page {page}: it is in use. Unmap first.")
        self.num_created -= 1
        del self._bytes[page]

    def map(self, address: int, page: Page) -> None:
        """Map a page: its bytes appear at `address`."""
        self._count_call("map")
        self._check_aligned(address)
        self._check_page("map", page)
        if address in self.mapped or page in self._in_use:
            raise PageError(f"map page {page} at {address:#x}: one of them is in use. Unmap first.")
        self._window(address).copy_(self._bytes[page])
        self.mapped[address] = page
        self._in_use.add(page)

    def set_access(self, address: int, size_bytes: int) -> None:
        """Allow access to whole mappings only."""
        self._count_call("set_access")
        self._check_aligned(address)
        self._check_size(size_bytes)
        addresses = range(address, address + size_bytes, self.granularity_bytes)
        if missing := [a for a in addresses if a not in self.mapped]:
            raise PageError(f"access to {missing[0]:#x}, where nothing is mapped. Map first.")
        self.accessible.update(addresses)

    def unmap(self, address: int) -> None:
        """Unmap a page: its bytes leave with it."""
        self._count_call("unmap")
        if address not in self.mapped:
            raise PageError(f"unmap {address:#x}: no mapping begins there. Unmap a mapping as a whole, once.")
        if self.busy:
            raise PageError(f"unmap {address:#x} while work is queued. Wait first.")
        page = self.mapped.pop(address)
        self._in_use.discard(page)
        self._bytes[page].copy_(self._window(address))
        self.accessible.discard(address)
        self._window(address).fill_(self.POISON)

    def wait(self) -> None:
        self.busy = False

    def fence(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _count_call(self, name: str) -> None:
        self.num_calls += 1
        if self.num_calls - 1 == self.fail_at:
            raise PageError(f"{name} failed, as planned")

    def _window(self, address: int) -> torch.Tensor:
        return self.view(address, self.granularity_bytes)

    def _range_of(self, address: int) -> tuple[int, torch.Tensor]:
        for start, memory in self._ranges:
            if start <= address < start + memory.numel():
                return start, memory
        raise PageError(f"{address:#x} lies in no reserved range.")

    def _check_page(self, name: str, page: Page) -> None:
        if page not in self._bytes:
            raise PageError(f"{name} page {page}: there is no page {page}. Create it first.")

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes < 1:
            raise PageError(f"{size_bytes} B: at least {self.granularity_bytes} B, the granularity, are needed.")
        self._check_aligned(size_bytes)

    def _check_aligned(self, value: int) -> None:
        if value % self.granularity_bytes:
            raise PageError(f"{value:#x} is no multiple of the granularity, {self.granularity_bytes} B.")
