"""Memory behind a KV cache: one buffer of the maximum size whose pages come and go. `HostBacking` is host memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

import torch

from kv_resize.errors import BackingError
from kv_resize.geometry import ByteRange
from kv_resize.host_memory import available_bytes

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; missing from older Pythons
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in Python's mmap
_MADV_NOHUGEPAGE = 15
_WORD = torch.int64

BlockPairs = Sequence[tuple[int, int]]  # (source, destination) block ids


class Backing(Protocol):
    """A buffer of fixed size and address. Populate and release take page-aligned ranges."""

    page_bytes: int
    size_bytes: int

    @property
    def buffer(self) -> torch.Tensor:
        """int8 [size_bytes]. Reading or writing outside populated ranges is the caller's error."""
        ...

    def populate(self, ranges: Sequence[ByteRange]) -> None:
        """Make pages resident; pages that were not are zero.

        Raises:
            BackingError: Not enough memory. Some of the pages may be resident: release them.
        """
        ...

    def release(self, ranges: Sequence[ByteRange]) -> None:
        """Give pages back to the system; their contents are gone.

        Raises:
            BackingError: The system keeps them: nobody can say any more what is in them.
        """
        ...

    def resident_bytes(self, ranges: Sequence[ByteRange]) -> int:
        """Return the bytes of the pages in `ranges` that take up memory now."""
        ...

    def zero(self, ranges: Sequence[ByteRange]) -> None:
        """Overwrite populated bytes (any alignment) with zero."""
        ...

    def copy_rows(self, offset: int, stride: int, pairs: BlockPairs) -> None:
        """Copy `stride` bytes from row src to row dst, for each (src, dst); rows start at `offset`.

        No destination is also a source.
        """
        ...


class HostBacking:
    """One anonymous private mapping. Untouched pages cost nothing; released pages really leave.

    The buffer keeps the mapping alive: it goes when the last tensor on it goes.
    """

    def __init__(self, size_bytes: int, huge_pages: bool = False) -> None:
        """Reserve address space.

        Args:
            size_bytes: Length of the buffer; the mapping is rounded up to whole pages.
            huge_pages: Let the kernel use transparent huge pages where the system is set to "always".
                A huge page takes memory up to 2 MiB beyond a populated range, once per run.

        Raises:
            BackingError: The system refuses the address space.
        """
        if size_bytes < 1:
            raise BackingError(f"a backing of {size_bytes} B; it must hold at least 1 B.")
        self.page_bytes = mmap.PAGESIZE
        self.size_bytes = size_bytes
        self._mapped_bytes = -(-size_bytes // self.page_bytes) * self.page_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            self._map = mmap.mmap(-1, self._mapped_bytes, flags=flags | _MAP_NORESERVE)
        except OSError as e:
            raise BackingError(
                f"cannot reserve {self._mapped_bytes:,} B of address space: {e.strerror}. Lower the maximum "
                "number of KV blocks, or raise the limit (ulimit -v, ulimit -d, vm.overcommit_memory)."
            ) from e
        if not huge_pages:
            self._advise(_MADV_NOHUGEPAGE, 0, self._mapped_bytes)
        self.keep_free_bytes = 0  # of the system's memory, for others than this cache
        self.num_sharers = 1  # caches on this host that grow at the same time by as much
        self._whole = torch.frombuffer(self._map, dtype=torch.int8)
        self._buffer = self._whole[:size_bytes]
        self._can_populate = True

    @property
    def buffer(self) -> torch.Tensor:
        """int8 [size_bytes]."""
        return self._buffer

    def populate(self, ranges: Sequence[ByteRange]) -> None:
        """Make pages resident, without touching the contents of those that are."""
        self._check_pages(ranges)
        wanted = sum(end - start for start, end in ranges)
        available = available_bytes()
        if available is not None and self._needs(wanted) > available:
            wanted -= self.resident_bytes(ranges)  # a walk over them all, so only where it may matter
        if available is not None and self._needs(wanted) > available:
            # Linux grants memory it does not have and then kills the process that uses it.
            shared = f" on each of {self.num_sharers} ranks" if self.num_sharers > 1 else ""
            raise BackingError(
                f"no memory for {wanted:,} B of KV cache{shared}: {available:,} B are available, "
                f"{self.keep_free_bytes:,} B are kept free for a worst-case forward pass.",
                available_bytes=max(available - self.keep_free_bytes, 0) // self.num_sharers,
            )
        for start, end in ranges:
            if self._can_populate:
                error = self._advise(_MADV_POPULATE_WRITE, start, end)
                self._can_populate = error != errno.EINVAL  # a kernel before 5.14
                if error and self._can_populate:
                    raise BackingError(
                        f"no memory for {end - start:,} B of KV cache ({errno.errorcode[error]})."
                    )
            if not self._can_populate:
                # One write per page; adding zero keeps what a page shared with a live block holds.
                self._whole[start : end : self.page_bytes].add_(0)

    def _needs(self, wanted_bytes: int) -> int:
        """Return what must be available so that so many bytes may be taken."""
        return wanted_bytes * self.num_sharers + self.keep_free_bytes

    def release(self, ranges: Sequence[ByteRange]) -> None:
        """Give pages back to the system."""
        self._check_pages(ranges)
        for start, end in ranges:
            if error := self._advise(mmap.MADV_DONTNEED, start, end):  # the next owner would read these blocks as zero
                raise BackingError(
                    f"the system keeps {end - start:,} B of KV cache that were given back (MADV_DONTNEED: "
                    f"{errno.errorcode.get(error, error)}). Do not lock the server's memory (mlockall)."
                )

    def resident_bytes(self, ranges: Sequence[ByteRange]) -> int:
        """Return the bytes of resident pages, from mincore(2)."""
        self._check_pages(ranges)
        address = self._whole.data_ptr()
        pages = 0
        for start, end in ranges:
            vector = torch.empty((end - start) // self.page_bytes, dtype=torch.uint8)
            arguments = ctypes.c_void_p(address + start), ctypes.c_size_t(end - start)
            if _libc.mincore(*arguments, ctypes.c_void_p(vector.data_ptr())):
                code = ctypes.get_errno()
                raise BackingError(f"mincore of {end - start:,} B: {errno.errorcode.get(code, code)}.")
            pages += int(vector.bitwise_and_(1).sum())  # the other bits are undefined
        return pages * self.page_bytes

    def zero(self, ranges: Sequence[ByteRange]) -> None:
        for start, end in ranges:
            self._buffer[start:end].zero_()

    def copy_rows(self, offset: int, stride: int, pairs: BlockPairs) -> None:
        """Copy by one memmove(3) per row: a row is some kilobytes, and a tensor operation costs as much as its copy."""
        address, end = self._whole.data_ptr() + offset, (self.size_bytes - offset) // stride
        for src, dst in pairs:
            if not (0 <= src < end and 0 <= dst < end):  # memmove asks nobody
                raise BackingError(f"copy of row {src} to row {dst}: the buffer has {end}.")
            ctypes.memmove(address + dst * stride, address + src * stride, stride)

    def _advise(self, advice: int, start: int, end: int) -> int:
        """Return the errno of madvise(2), 0 for success."""
        try:
            self._map.madvise(advice, start, end - start)
        except OSError as e:
            return e.errno or errno.EIO
        return 0

    def _check_pages(self, ranges: Iterable[ByteRange]) -> None:
        check_pages(ranges, self.page_bytes, self._mapped_bytes)


def copy_rows(buffer: torch.Tensor, offset: int, stride: int, pairs: BlockPairs) -> None:
    """Copy as `Backing.copy_rows` on any buffer: two operations, however many pairs, queued on the current stream."""
    rows = (buffer.numel() - offset) // stride
    view = buffer[offset : offset + rows * stride].view(rows, stride)
    whole_words = not (stride % _WORD.itemsize or (buffer.data_ptr() + offset) % _WORD.itemsize)
    if whole_words:  # a device copies eight bytes at a time as fast as one
        view = view.view(_WORD)
    sources, destinations = _indices(tuple(pairs), buffer.device)
    view.index_copy_(0, destinations, view.index_select(0, sources))


@lru_cache(maxsize=1)
def _indices(pairs: tuple[tuple[int, int], ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Put sources and destinations on the device: one copy for all layers, that waits for nothing."""
    both = torch.tensor(pairs, dtype=torch.int64).t().contiguous()
    both = both.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else both.to(device)
    return both[0], both[1]


def check_pages(ranges: Iterable[ByteRange], page_bytes: int, end_bytes: int) -> None:
    """Refuse ranges that are empty, outside, or not of whole pages.

    Raises:
        BackingError: Names the range.
    """
    for start, end in ranges:
        if start % page_bytes or end % page_bytes or not 0 <= start < end <= end_bytes:
            raise BackingError(
                f"range [{start}, {end}) of a buffer of {end_bytes} B: must be not empty, inside, and "
                f"aligned to {page_bytes} B."
            )


_libc = ctypes.CDLL(None, use_errno=True)
