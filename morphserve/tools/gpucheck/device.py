"""A device and its stand-in: streams, events, graphs and pagers, so that one code path runs on a GPU and in a dry run.

On CPU work is done when it is called: a stream is none, an event has always happened, and a graph is the function that
would have been captured. That tries the code and proves nothing about a device.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kv_resize import FakePager, Pager
from morphserve.tools.gpucheck.bench import Bench, Skip

Work = Callable[[], None]
_CUDA: Any = torch.cuda  # parts of it are untyped
MIB = 1 << 20
_WARM_UPS = 3


def require_device(bench: Bench) -> None:
    """
    Raises:
        RuntimeError: the part is to run on CUDA, and torch has no device. No skip: the driver has one.
    """
    if bench.device == "cuda" and not torch.cuda.is_available():
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        raise RuntimeError(f"the driver lists a device, torch sees none: {built}; install one that fits the driver")


def synchronize(device: str) -> None:
    """Until all that is queued on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def side_stream(device: str) -> Any:
    """A stream of low priority beside the current one; None on CPU."""
    return _CUDA.Stream(priority=0) if device == "cuda" else None


def on_stream(stream: Any) -> contextlib.AbstractContextManager[Any]:
    """Queue to this stream inside the block."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


class Mark:
    """A place in the work queued on the current stream."""

    def __init__(self, device: str, timed: bool = True) -> None:
        self._event: Any = _CUDA.Event(enable_timing=timed) if device == "cuda" else None
        if self._event is not None:
            self._event.record()
        self._at_s = time.perf_counter()

    @property
    def passed(self) -> bool:
        """Whether all that was queued before is done."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> None:
        """Until it is."""
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
        device: on "cpu" nothing is captured, and `work` itself comes back.
        work: reads and writes tensors that stay where they are.
        pool: of another graph's memory, see `graph_pool`.
    """
    if device != "cuda":
        work()
        return work
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


def graph_pool(device: str) -> Any:
    """Memory that several graphs share, of which one runs at a time."""
    return torch.cuda.graph_pool_handle() if device == "cuda" else None


def free_bytes(device: str) -> int:
    """Of the device, as its driver counts; 0 on CPU."""
    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else 0


def pinned(num_bytes: int, device: str) -> torch.Tensor:
    """uint8 [num_bytes] of host memory that the device copies from by itself."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device == "cuda")


def new_pager(bench: Bench, num_pages: int, page_bytes: int | None = None, streams: Sequence[Any] = ()) -> Any:
    """A `Pager` for `num_pages`; `close_pager` ends it.

    Args:
        bench: says where.
        num_pages: the stand-in refuses more.
        page_bytes: None = the device's granularity, 4 KiB in a dry run.
        streams: whose work is waited for before a page is unmapped.

    Raises:
        Skip: there is no pager for this device.
    """
    if bench.device != "cuda":
        return FakePager(num_pages, page_bytes or 4096)
    if importlib.util.find_spec("kv_resize.cuda_pager") is None:
        raise Skip("kv_resize has no cuda_pager: nothing can be mapped on a device")
    pager: Pager = importlib.import_module("kv_resize.cuda_pager").CudaPager(
        torch.cuda.current_device(), tuple(s for s in streams if s is not None), page_bytes=page_bytes
    )
    return pager


def current_stream(device: str) -> Any:
    """None on CPU."""
    return torch.cuda.current_stream() if device == "cuda" else None


def close_pager(pager: Any) -> None:
    """Give its memory back. Tensors over its addresses must not be touched any more."""
    if hasattr(pager, "close"):
        pager.close()


def random_weight(n: int, k: int, device: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[N, K], scaled so that a linear keeps the size of what goes through it."""
    generator = torch.Generator(device=device).manual_seed(seed)
    weight = torch.randn(n, k, device=device, generator=generator, dtype=torch.float32)
    return weight.mul_(k**-0.5).to(dtype)
