"""Figures that need the server's time series: recovery, tokens by level, their price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from morphserve.tools.workload.outcome import Snapshot


def level_zero_after_s(series: Sequence[Snapshot], level0_blocks: int | None) -> float | None:
    """Return the seconds from the end of pressure to level 0, in the slowest of the times the level left 0.

    Pressure: requests wait, or live requests hold more blocks than level 0 has. Where the level left 0 on a
    forecast and neither came, it counts from the first moment with the most blocks in use.

    Args:
        series: in time order.
        level0_blocks: null block included; None = the least that was ever published.

    Returns:
        None if the level never left 0, or was not back at the end of the series.
    """
    known = [s for s in series if s.level is not None]
    if not known or known[-1].level:
        return None
    if level0_blocks is None:
        level0_blocks = min((s.blocks_published for s in known if s.blocks_published), default=None)
    times: list[float] = []
    away: list[Snapshot] = []
    for snapshot in known:
        if snapshot.level:
            away.append(snapshot)
        elif away:
            times.append(snapshot.t_s - _pressure_end_s(away, level0_blocks))
            away = []
    return max(times, default=None)


def _pressure_end_s(away: Sequence[Snapshot], level0_blocks: int | None) -> float:
    """Return when the reason to be away from level 0 ended."""

    def pressed(s: Snapshot) -> bool:
        over = level0_blocks is not None and (s.blocks_used or 0) > level0_blocks - 1
        return bool(s.waiting) or over

    last = [s.t_s for s in away if pressed(s)]
    return last[-1] if last else max(away, key=lambda s: s.blocks_used or 0).t_s


def gained(first: dict[str, int], last: dict[str, int]) -> dict[str, int]:
    """Subtract two readings of a family of counters; zero rows are left out."""
    delta = {key: last[key] - first.get(key, 0) for key in last}
    return {key: value for key, value in sorted(delta.items()) if value > 0}


def expected_kl(tokens_by_level: dict[str, int], status: dict[str, Any] | None) -> float | None:
    """Average the expected KL of the tokens' levels, in nats; None where a level was never measured."""
    total = sum(tokens_by_level.values())
    if status is None or not total:
        return None
    ladder = {str(row.get("level")): row.get("expected_kl") for row in status.get("ladder") or ()}
    ladder["0"] = 0.0  # KL is measured against level 0
    cost = 0.0
    for level, tokens in tokens_by_level.items():
        kl = ladder.get(level)
        if kl is None:
            return None
        cost += tokens * kl
    return cost / total


def level0_blocks(status: dict[str, Any] | None) -> int | None:
    """Return the blocks of level 0, null block included, from the status page."""
    for row in (status or {}).get("ladder") or ():
        if row.get("level") == 0 and row.get("num_kv_blocks"):
            return int(row["num_kv_blocks"])
    return None


def committed(transitions: dict[str, int]) -> int:
    """Count the transitions that reached their level."""
    return sum(n for key, n in transitions.items() if key.rpartition("/")[2] == "committed")
