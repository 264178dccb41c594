"""Where we touch vLLM: one row a place, with its reason, checked before anything is installed."""

from __future__ import annotations

from morphserve.integration.seams.cuda import CUDA_KERNEL_SEAMS, CUDA_SEAMS
from morphserve.integration.seams.rows import (
    SEAMS,
    Seam,
    SeamResult,
    check_all,
    check_seam,
    check_version,
    require_all,
    resolve,
    uninstall,
    wrap,
)
from morphserve.integration.seams.source import check_sources, check_sources_version, sources_version
from morphserve.integration.seams.tree import SourceTree

__all__ = [
    "CUDA_KERNEL_SEAMS",
    "CUDA_SEAMS",
    "SEAMS",
    "Seam",
    "SeamResult",
    "SourceTree",
    "check_all",
    "check_seam",
    "check_sources",
    "check_sources_version",
    "check_version",
    "require_all",
    "resolve",
    "sources_version",
    "uninstall",
    "wrap",
]
