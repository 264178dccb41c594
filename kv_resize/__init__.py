"""KV cache memory that grows and shrinks at its end. Needs torch, knows nothing of vLLM.

Importing it needs no device. Making a `CudaPager` does, and NVIDIA's `cuda-bindings`.
"""

from kv_resize.arena import ArenaBacking, PagePool
from kv_resize.backing import Backing, HostBacking
from kv_resize.cuda_pager import CudaPager
from kv_resize.elastic_cache import ElasticCache
from kv_resize.errors import BackingError, KVResizeError, MapError, PagerError
from kv_resize.geometry import ByteRange, KVGeometry, Placement, Run
from kv_resize.host_memory import available_bytes
from kv_resize.pager import FakePager, Page, Pager

__all__ = [
    "ArenaBacking",
    "Backing",
    "BackingError",
    "ByteRange",
    "CudaPager",
    "ElasticCache",
    "FakePager",
    "HostBacking",
    "KVGeometry",
    "KVResizeError",
    "MapError",
    "Page",
    "PagePool",
    "Pager",
    "PagerError",
    "Placement",
    "Run",
    "available_bytes",
]
