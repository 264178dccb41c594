"""Where we touch vLLM: one row a place, with its reason, checked before anything is installed; and how we patch it.

What checks sources instead of the installed vLLM loads late: it needs griffe, which a server does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from morphserve.integration.seams.check import (
    SeamResult,
    check_all,
    check_seam,
    check_version,
    remedy,
    require_all,
    resolve,
)
from morphserve.integration.seams.cuda import (
    CAPTURE_V1,
    CAPTURE_V2,
    CUDA_KERNEL_SEAMS,
    CUDA_SEAMS,
    GRAPH_MEMORY_V1,
    GRAPH_MEMORY_V2,
    KV_ALLOC_V2,
    WORKER_MEMORY,
    WORKER_WARM,
)
from morphserve.integration.seams.patch import Patch, patches, put, undo, wrap
from morphserve.integration.seams.rows import (
    CHOICE_OUTPUT,
    CLI_FLAGS,
    CLI_VALUES,
    CLIENT_GENERATE,
    CONFIG_CACHE,
    CORE_LIVENESS,
    DOOR_CHECK,
    DOOR_LIMIT,
    ENDPOINT_PLUGINS,
    ENGINE_CONFIG,
    ENGINE_CORE,
    ENGINE_HANDLE,
    ENGINE_RPC,
    ENGINE_START,
    ENGINE_UTILITIES,
    KV_ALLOC,
    KV_PLANNING,
    LOGITS,
    MANAGER_HIT,
    MANAGER_SLOTS,
    POOL_CACHE,
    POOL_CACHE_PARTIAL,
    POOL_FREE,
    POOL_HIT,
    REQUEST_SPAN,
    REQUEST_SPAN_MAKER,
    SEAMS,
    SERVE_HTTP,
    WEIGHTS_LOADED,
    WORKER_START,
    WORKER_WEIGHTS,
    Seam,
)
from morphserve.late import late

if TYPE_CHECKING:
    from morphserve.integration.seams.moved import Move, compare
    from morphserve.integration.seams.source import check_sources, check_sources_version, sources_version
    from morphserve.integration.seams.tree import SourceTree

__all__ = [
    "CAPTURE_V1",
    "CAPTURE_V2",
    "CHOICE_OUTPUT",
    "CLI_FLAGS",
    "CLIENT_GENERATE",
    "CLI_VALUES",
    "CONFIG_CACHE",
    "CORE_LIVENESS",
    "CUDA_KERNEL_SEAMS",
    "CUDA_SEAMS",
    "DOOR_CHECK",
    "DOOR_LIMIT",
    "ENDPOINT_PLUGINS",
    "ENGINE_CONFIG",
    "ENGINE_CORE",
    "ENGINE_HANDLE",
    "ENGINE_RPC",
    "ENGINE_START",
    "ENGINE_UTILITIES",
    "GRAPH_MEMORY_V1",
    "GRAPH_MEMORY_V2",
    "KV_ALLOC",
    "KV_ALLOC_V2",
    "KV_PLANNING",
    "LOGITS",
    "MANAGER_HIT",
    "MANAGER_SLOTS",
    "POOL_CACHE",
    "POOL_CACHE_PARTIAL",
    "POOL_FREE",
    "POOL_HIT",
    "Move",
    "Patch",
    "REQUEST_SPAN",
    "REQUEST_SPAN_MAKER",
    "SEAMS",
    "SERVE_HTTP",
    "Seam",
    "SeamResult",
    "SourceTree",
    "WEIGHTS_LOADED",
    "WORKER_MEMORY",
    "WORKER_START",
    "WORKER_WARM",
    "WORKER_WEIGHTS",
    "check_all",
    "check_seam",
    "check_sources",
    "check_sources_version",
    "check_version",
    "compare",
    "patches",
    "put",
    "remedy",
    "require_all",
    "resolve",
    "sources_version",
    "undo",
    "wrap",
]

_LATE = {
    "Move": "moved",
    "SourceTree": "tree",
    "check_sources": "source",
    "check_sources_version": "source",
    "compare": "moved",
    "sources_version": "source",
}
__getattr__ = late(__name__, _LATE)
