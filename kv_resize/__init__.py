"""KV cache memory that grows and shrinks at its end. Needs torch, knows nothing of vLLM."""

from kv_resize.backing import Backing, FakeBacking, HostBacking
from kv_resize.elastic_cache import ElasticCache
from kv_resize.errors import BackingError, KVResizeError, MapError
from kv_resize.geometry import ByteRange, KVGeometry, Placement, Run

__all__ = [
    "Backing",
    "BackingError",
    "ByteRange",
    "ElasticCache",
    "FakeBacking",
    "HostBacking",
    "KVGeometry",
    "KVResizeError",
    "MapError",
    "Placement",
    "Run",
]
