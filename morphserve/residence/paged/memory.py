"""What a rank takes its pages from."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from kv_resize import CudaPager, FakePager, PagePool, Pager
from morphserve.residence import Copier, CudaCopier, HostCopier

# Tests set it: pages in host memory that are only booked, in place of a GPU's. Everything above them is the same.
FAKE_DEVICE = "MORPHSERVE_FAKE_DEVICE"
_FAKE_PAGE_BYTES = 64 << 10
_FAKE_PAGES = 1 << 20


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """One rank's; lives as long as its process."""

    device_type: str
    pager: Pager
    pool: PagePool
    copier: Copier
    background: Executor  # one thread, whose device work goes to the copier's stream
    release_cached: Callable[[], None]  # gives the system what torch's allocator holds and nobody uses
    give_up: Callable[[], None]  # what the pager has, when its engine is gone
    total_bytes: int  # of the device, whoever holds them

    @property
    def page_bytes(self) -> int:
        return self.pager.granularity_bytes

    def close(self) -> None:
        """End the thread and give all pages back. Nothing of the engine may be used any more."""
        self.background.shutdown()
        self.give_up()


def wants_device(device_type: str) -> bool:
    """Whether layers and KV of an engine on this type of device go by the page."""
    return device_type == "cuda" or is_fake(device_type)


def is_fake(device_type: str) -> bool:
    """Whether a test asks for fake pages."""
    return device_type == "cpu" and os.environ.get(FAKE_DEVICE) == "1"


def open_memory(device: torch.device, forward_stream: Callable[[], Any]) -> DeviceMemory:
    """Open a rank's pages; nothing is allocated yet.

    Args:
        forward_stream: gives the CUDA stream of the forward passes, asked for once.

    Raises:
        PagerError: no such device, or cuda-bindings is missing.
    """
    if device.type != "cuda":
        pager = FakePager(_FAKE_PAGES, _FAKE_PAGE_BYTES)
        thread = ThreadPoolExecutor(1, "morphserve-pages")
        total = _FAKE_PAGES * _FAKE_PAGE_BYTES
        return DeviceMemory("cpu", pager, PagePool(pager, 0), HostCopier(), thread, _nothing, _nothing, total)
    device = numbered(device)
    copier = CudaCopier(device)
    streams = (forward_stream(), copier.stream)
    cuda_pager = CudaPager(device.index, streams)
    thread = ThreadPoolExecutor(1, "morphserve-pages", _on_stream, (device, copier.stream))
    thread.submit(_nothing).result()  # a thread that cannot work ends the start, not the first transition
    pool = PagePool(cuda_pager, 0)
    total = torch.cuda.get_device_properties(device).total_memory
    return DeviceMemory("cuda", cuda_pager, pool, copier, thread, torch.cuda.empty_cache, cuda_pager.close, total)


def numbered(device: torch.device) -> torch.device:
    """With its number: vLLM's is "cuda" alone, which means the rank's current device and must not become 0."""
    return device if device.index is not None else torch.device(device.type, torch.cuda.current_device())


def _nothing() -> None:
    return


def _on_stream(device: torch.device, stream: Any) -> None:
    """New blocks are cleared beside the forward passes, not between them."""
    torch.cuda.set_device(device)
    torch.cuda.set_stream(stream)
