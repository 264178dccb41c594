"""A paged residence on a CPU, whose pages are only booked: everything above the driver is what a GPU runs.

With this directory on the path the package registers itself, in every process of an engine, as another device's would.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kv_resize import FakePageAllocator, PagePool
from morphserve.residence import HostCopier, PagedResidence, RankSizes, start_thread

_PAGE_BYTES = 64 << 10
_NUM_PAGES = 1 << 20


class FakePages(PagedResidence):
    """Takes the place of `HostResidence`."""

    @classmethod
    def open(cls, device: torch.device, forward_stream: Callable[[], object], sizes: RankSizes) -> FakePages:
        allocator = FakePageAllocator(_NUM_PAGES, _PAGE_BYTES)
        total = _NUM_PAGES * _PAGE_BYTES
        pool, thread = PagePool(allocator, 0), start_thread()
        return cls(device, allocator, pool, HostCopier(), thread, _nothing, _nothing, total, lambda: 0)


def _nothing() -> None:
    return
