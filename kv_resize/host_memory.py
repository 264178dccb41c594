"""How much memory this process may still take: by the system, by its control groups, by its own limits."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the smallest of what the system has and what limits of control groups leave; None if nothing is known.

    Args:
        root: Where /proc and /sys are.
    """
    known = [v for v in (_system_bytes(root), *_cgroup_bytes(root)) if v is not None]
    return min(known) if known else None


def unmapped_bytes(root: Path = Path("/")) -> int | None:
    """Return what the limits of the process (ulimit -v, ulimit -d) let it map beyond what it has; None without limits.

    Pages of a mapping that there is cost nothing of this: a KV cache is counted whole once it is reserved.
    """
    limits = {"VmSize": resource.RLIMIT_AS, "VmData": resource.RLIMIT_DATA}
    try:
        lines = (root / "proc/self/status").read_text().splitlines()
    except OSError:
        return None
    left = []
    for key, _, value in (line.partition(":") for line in lines):
        soft = resource.getrlimit(limits[key])[0] if key in limits else resource.RLIM_INFINITY
        if soft != resource.RLIM_INFINITY:
            left.append(max(soft - int(value.split()[0]) * 1024, 0))
    return min(left) if left else None


def _system_bytes(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_bytes(root: Path) -> list[int]:
    """Return what is left under each limit between this process's groups and the top, of either version."""
    try:
        own = (root / "proc/self/cgroup").read_text()
    except OSError:
        return []
    left: list[int] = []
    for line in own.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            left += _left_under(root / "sys/fs/cgroup", path, _group_v2)
        elif "memory" in controllers.split(","):
            left += _left_under(root / "sys/fs/cgroup/memory", path, _group_v1)
    return left


def _left_under(top: Path, path: str, read: Callable[[Path], int | None]) -> list[int]:
    """Ask a group and all above it: a container may see its own group as the top, under another name."""
    group = top / path.lstrip("/")
    left: list[int] = []
    while group.is_relative_to(top):
        if (value := read(group)) is not None:
            left.append(value)
        group = group.parent
    return left


def _group_v2(group: Path) -> int | None:
    """Return what is left under both limits: beyond `memory.high` the kernel slows a process until it stands still."""
    limits = [value for name in ("memory.max", "memory.high") if (value := _number(group / name)) is not None]
    return _left(limits, group / "memory.current", group / "memory.stat", "inactive_file ")


def _group_v1(group: Path) -> int | None:
    limits = [v for v in (_number(group / "memory.limit_in_bytes"),) if v is not None]
    return _left(limits, group / "memory.usage_in_bytes", group / "memory.stat", "total_inactive_file ")


def _left(limits: list[int], usage: Path, stat: Path, key: str) -> int | None:
    """Return what the tightest limit leaves."""
    used = _number(usage)
    if not limits or used is None:
        return None
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return None
    # File pages not in active use count as used but are given up under pressure.
    cached = sum(int(line.split()[1]) for line in lines if line.startswith(key))
    return max(min(limits) - used + cached, 0)


def _number(file: Path) -> int | None:
    """Return the number in a file; None for "max", and where there is none."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
