"""A device and its stand-in: streams, events, graphs and page allocators, so that a dry run takes the same path.

On CPU work is done when it is called: a stream is none, an event has always happened, and a graph is the function that
would have been captured, at the linears that it would have been captured with. That tries the code and proves nothing
about a device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from kv_resize import CudaPageAllocator, FakePageAllocator
from morphserve.residence import WeightSlot, slots
from morphserve.tools.gpucheck.bench import Bench
from quant_layers import LinearImpl

Work = Callable[[], None]
_CUDA: Any = torch.cuda  # parts of it are untyped
MIB = 1 << 20
_WARM_UPS = 3


def require_device(bench: Bench) -> None:
    """Refuse to run a part on a device that torch does not see.

    Raises:
        RuntimeError: the part is to run on CUDA, and torch has no device. No skip: the driver has one.
    """
    if bench.device == "cuda" and not torch.cuda.is_available():
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        raise RuntimeError(f"the driver lists a device, torch sees none: {built}; install one that fits the driver")


def synchronize(device: str) -> None:
    """Wait until all that is queued on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def side_stream(device: str) -> Any:
    """Return a stream of low priority beside the current one; None on CPU."""
    return _CUDA.Stream(priority=0) if device == "cuda" else None


def on_stream(stream: Any) -> contextlib.AbstractContextManager[Any]:
    """Queue to this stream inside the block."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


class Mark:
    """A place in the work queued on the current stream."""

    def __init__(self, device: str) -> None:
        self._event: Any = _CUDA.Event(enable_timing=True) if device == "cuda" else None
        if self._event is not None:
            self._event.record()
        self._at_s = time.perf_counter()

    @property
    def passed(self) -> bool:
        """Whether all that was queued before is done."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> None:
        """Wait until it has happened."""
        if self._event is not None:
            self._event.synchronize()

    def us_since(self, earlier: Mark) -> float:
        """Microseconds on the device, once both have passed."""
        if self._event is None:
            return (self._at_s - earlier._at_s) * 1e6
        return float(earlier._event.elapsed_time(self._event)) * 1e3


def capture(device: str, work: Work, pool: Any = None) -> Work:
    """Run `work` a few times, capture it, and return what replays it.

    Args:
        device: on "cpu" nothing is captured, see `replay_without_graph`.
        work: reads and writes tensors that stay where they are.
        pool: of another graph's memory, see `graph_pool`.
    """
    if device != "cuda":
        work()
        return replay_without_graph(work)
    stream = _CUDA.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):  # what is compiled or chosen at first use must not be captured
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()

    def replay(kept: Work = work) -> None:  # whatever the graph reads must live as long as it
        graph.replay()

    return replay


def replay_without_graph(work: Work) -> Work:
    """Do `work` with the linears of now, whatever has been swapped: a graph keeps the kernels of its capture."""
    captured = {slot: slot.impl for slot in slots().values()}

    def replay() -> None:
        with linears(captured):
            work()

    return replay


@contextlib.contextmanager
def linears(impls: Mapping[WeightSlot, LinearImpl]) -> Iterator[None]:
    """Inside, these run."""
    present = {slot: slot.impl for slot in impls}
    for slot, impl in impls.items():
        slot.impl = impl
    try:
        yield
    finally:
        for slot, impl in present.items():
            slot.impl = impl


def graph_pool(device: str) -> Any:
    """Memory that several graphs share, of which one runs at a time."""
    return torch.cuda.graph_pool_handle() if device == "cuda" else None


def free_bytes(device: str) -> int:
    """Return what is free of the device, as its driver counts; 0 on CPU."""
    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else 0


def pinned(num_bytes: int, device: str) -> torch.Tensor:
    """Return uint8 [num_bytes] of host memory that the device copies from by itself."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device == "cuda")


@contextlib.contextmanager
def open_page_allocator(bench: Bench, num_pages: int, page_bytes: int | None = None) -> Iterator[Any]:
    """Open a `PageAllocator` whose memory goes at the end: tensors over its addresses must not be touched then.

    Args:
        bench: says where.
        num_pages: the stand-in refuses more.
        page_bytes: None = the device's granularity, 4 KiB in a dry run.

    Raises:
        PageError: no such device, or cuda-bindings is missing.
    """
    if bench.device != "cuda":
        yield FakePageAllocator(num_pages, page_bytes or 4096)
        return
    streams = [torch.cuda.current_stream()]
    with CudaPageAllocator(torch.cuda.current_device(), streams, page_bytes=page_bytes) as allocator:
        try:
            yield allocator
        finally:
            synchronize(bench.device)


def random_weight(n: int, k: int, device: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return [N, K], scaled so that a linear keeps the size of what goes through it."""
    generator = torch.Generator(device=device).manual_seed(seed)
    weight = torch.randn(n, k, device=device, generator=generator, dtype=torch.float32)
    return weight.mul_(k**-0.5).to(dtype)
