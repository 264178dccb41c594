"""KV cache memory that grows and shrinks at its end. Needs torch, knows nothing of vLLM.

Importing it needs no device. Making a `CudaPageAllocator` does, and NVIDIA's `cuda-bindings`.
"""

from kv_resize.arena import ArenaBacking, PagePool
from kv_resize.backing import Backing, HostBacking
from kv_resize.cuda_page_allocator import CudaPageAllocator
from kv_resize.elastic_cache import ElasticCache
from kv_resize.errors import BackingError, KVResizeError, MapError, PageError
from kv_resize.geometry import ByteRange, KVGeometry, Placement, Run
from kv_resize.host_memory import available_bytes, unmapped_bytes
from kv_resize.page_allocator import FakePageAllocator, Page, PageAllocator

__all__ = [
    "ArenaBacking",
    "Backing",
    "BackingError",
    "ByteRange",
    "CudaPageAllocator",
    "ElasticCache",
    "FakePageAllocator",
    "HostBacking",
    "KVGeometry",
    "KVResizeError",
    "MapError",
    "Page",
    "PagePool",
    "PageAllocator",
    "PageError",
    "Placement",
    "Run",
    "available_bytes",
    "unmapped_bytes",
]
