"""How much memory this process may still take, by the system and by its control group."""

from __future__ import annotations

from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the smaller of what the system has and what cgroup v2 limits leave; None if neither is known.

    Args:
        root: Where /proc and /sys are.
    """
    known = [v for v in (_system_bytes(root), _cgroup_bytes(root)) if v is not None]
    return min(known) if known else None


def _system_bytes(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_bytes(root: Path) -> int | None:
    """Return the tightest limit between this process's group and the top, minus what is in use there."""
    try:
        own = (root / "proc/self/cgroup").read_text()
    except OSError:
        return None
    paths = [line[3:] for line in own.splitlines() if line.startswith("0::")]
    if not paths:
        return None
    top = root / "sys/fs/cgroup"
    group = top / paths[0].lstrip("/")
    left: list[int] = []
    while group.is_relative_to(top):
        if (value := _group_bytes(group)) is not None:
            left.append(value)
        group = group.parent
    return min(left) if left else None


def _group_bytes(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        stat = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return None
    # File pages not in active use count as used but are given up under pressure.
    cached = sum(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
    return max(int(limit) - used + cached, 0)
