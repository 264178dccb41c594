"""One stream for the captures of all graph sets: memory of a graph pool is reused on the stream alone that took it.

vLLM makes a stream for each capture (vllm/distributed/parallel_state.py, `graph_capture`), and captures once; levels
capture once each. Torch's allocator hands a freed block out to the stream alone that it was allocated on, in private
pools too (c10/cuda/CUDACachingAllocator.cpp, BlockComparator), so each later graph set would take the working memory of
a step anew, in every pool: most of the 0.4 GiB that a level's set took on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def one_capture_stream() -> Iterator[None]:
    """Inside, every capture of vLLM's runs on the stream of the first."""
    from vllm.distributed import parallel_state

    module: Any = parallel_state
    make = module.GraphCaptureContext
    streams: list[Any] = []

    def context(stream: Any) -> Any:
        streams.append(stream)
        return make(streams[0])

    module.GraphCaptureContext = context
    try:
        yield
    finally:
        module.GraphCaptureContext = make
