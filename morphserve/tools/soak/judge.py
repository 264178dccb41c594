"""What must hold of a soak, held against its rows: every answer right and whole, and nothing that adds up."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from morphserve.tools.soak.run import OURS, STOCK
from morphserve.tools.soak.trend import Slope, percentile, slope

MAX_MIB_PER_HOUR = 1.0  # beyond what a stock server grows by under the same load
_MAX_TICK_GROWTH = 1.5  # of the 99th percentile, last quarter over first; quarters of a quiet run differ by less
_SURE = 2.0  # standard errors
_ROLES = ("api", "core", "rank")
Row = Mapping[str, Any]


def report(rows: Sequence[Row], warm_up_minutes: float) -> dict[str, Any]:
    """Return the figures of a run, and under `violations` what does not hold, a sentence each."""
    sides = {side: [row for row in rows if row.get("side") == side] for side in (OURS, STOCK)}
    figures = {
        "minutes": round(sides[OURS][-1]["t_s"] / 60, 1),
        "warm_up_minutes": warm_up_minutes,
        "requests": {side: _counts(series[-1]) for side, series in sides.items()},
        "memory": _memory(sides, 60 * warm_up_minutes),
        "fds": {side: _steps(series, "num_fds") for side, series in sides.items()},
        "threads": {side: _steps(series, "num_threads") for side, series in sides.items()},
        "cpu_share": {side: _cpu_share(series) for side, series in sides.items()},
        "tick_us": _ticks(sides[OURS]),
        **_status(sides[OURS]),
    }
    return {**figures, "violations": [*_answers(sides), *_status_faults(sides[OURS]), *_growth(figures), *_left(rows)]}


def _counts(last: Row) -> dict[str, Any]:
    return {key: last[key] for key in ("sent", "answered", "given_up", "lost", "wrong", "tokens", "receipts")}


def _answers(sides: Mapping[str, Sequence[Row]]) -> Iterable[str]:
    for side, series in sides.items():
        last = series[-1]
        if last["lost"] or last["wrong"]:
            faults = "; ".join(last["faults"][:3])
            yield f"{side}: {last['lost']} lost, {last['wrong']} wrong of {last['sent']}: {faults}"
        if last["answered"] + last["given_up"] + last["lost"] != last["sent"]:
            yield f"{side}: the books do not add up: {_counts(last)}"


def _points(series: Sequence[Row], role: str, key: str, scale: float = 1.0) -> list[tuple[float, float]]:
    found = []
    for row in series:
        values = [process[key] for process in row["processes"] if process["role"] == role]
        if values:
            found.append((row["t_s"], sum(values) * scale))
    return found


def _memory(sides: Mapping[str, Sequence[Row]], after_s: float) -> dict[str, Any]:
    """Fit what each process has resident, behind the warm-up; both servers' sums, and the difference."""
    found: dict[str, Any] = {}
    for key in ("rss_kib", "anonymous_kib"):
        sums: dict[str, Slope] = {}
        for side, series in sides.items():
            late = [row for row in series if row["t_s"] >= after_s]
            total: dict[float, float] = {}
            for role in _ROLES:
                points = _points(late, role, key, 1 / 1024)
                for at_s, mib in points:
                    total[at_s] = total.get(at_s, 0.0) + mib
                if fitted := slope(points):
                    ends = {"first_mib": round(points[0][1], 2), "last_mib": round(points[-1][1], 2)}
                    found.setdefault(key, {})[f"{side} {role}"] = {**ends, **fitted.as_json()}
            if fitted := slope(sorted(total.items())):
                sums[side] = fitted
                found.setdefault(key, {})[side] = fitted.as_json()
        if len(sums) == 2:
            found[key]["beyond_stock"] = sums[OURS].beyond(sums[STOCK]).as_json()
    return found


def _growth(figures: Mapping[str, Any]) -> Iterable[str]:
    for key, fitted in figures["memory"].items():
        # What does not grow by itself needs no stock beside it, whose own figures may scatter by more.
        slopes = [fitted[name] for name in (OURS, "beyond_stock") if name in fitted]
        if slopes and all(found["per_hour"] + _SURE * found["error"] > MAX_MIB_PER_HOUR for found in slopes):
            sure = " MiB an hour, ".join(f"{found['per_hour']:.2f} +- {found['error']:.2f}" for found in slopes)
            yield f"{key.removesuffix('_kib')} grows by {sure} beyond stock's; {MAX_MIB_PER_HOUR:g} is allowed"
    for side, steps in figures["fds"].items():
        for role, seen in steps.items():
            if seen["last_half_max"] > seen["first_half_max"]:
                yield f"{side} {role}: {seen['last_half_max']} open files, {seen['first_half_max']} in the first half"
    first, last = figures["tick_us"].get("first_quarter"), figures["tick_us"].get("last_quarter")
    if first and last:
        yield from _tick_growth(first, last)


def _tick_growth(first: Mapping[str, Any], last: Mapping[str, Any]) -> Iterable[str]:
    ends = f"the tick's 99th percentile was {first['p99']} us in the first quarter, {last['p99']} us in the last"
    if last["p99"] > _MAX_TICK_GROWTH * first["p99"]:
        yield ends
    elif max(first["p99"], last["p99"]) >= last["edge"]:
        yield f"{ends}: beyond where the histogram ends, so nobody knows whether it grew; a quieter machine tells"


def _steps(series: Sequence[Row], key: str) -> dict[str, Any]:
    """Compare the first half's greatest count with the last half's, by role of the process."""
    half = len(series) // 2
    found = {}
    for role in _ROLES:
        first, last = ([value for _, value in _points(part, role, key)] for part in (series[:half], series[half:]))
        if first and last:
            found[role] = {"first_half_max": int(max(first)), "last_half_max": int(max(last)), "last": int(last[-1])}
    return found


def _cpu_share(series: Sequence[Row]) -> float | None:
    """Return how much of a core the server's processes took, from the first sample to the last."""
    first, last = series[0], series[-1]
    seconds = [sum(process["cpu_s"] for process in row["processes"]) for row in (first, last)]
    time_s = last["t_s"] - first["t_s"]
    return round((seconds[1] - seconds[0]) / time_s, 3) if time_s else None


def _ticks(series: Sequence[Row]) -> dict[str, Any]:
    """Return percentiles of the controller's part of a step, in microseconds, by quarter and in all."""
    known = [row for row in series if row.get("status")]
    quarter = len(known) // 4
    if not quarter:
        return {}
    parts = {f"{name}_quarter": known[i * quarter : (i + 1) * quarter + 1] for i, name in enumerate(_NAMES)}
    return {name: _between(part[0], part[-1]) for name, part in {**parts, "all": known}.items()}


_NAMES = ("first", "second", "third", "last")


def _between(first: Row, last: Row) -> dict[str, Any]:
    old, new = (row["status"]["controller_time"] for row in (first, last))
    counts = [after - before for before, after in zip(old["counts"], new["counts"], strict=True)]
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    found = {name: percentile(new["edges_s"], counts, share) for name, share in shares.items()}
    mean = (new["sum_s"] - old["sum_s"]) / max(1, sum(counts))
    values = {name: None if value is None else round(1e6 * value, 1) for name, value in found.items()}
    edge = round(1e6 * new["edges_s"][-1], 1)  # what is longer is only counted
    return {"steps": sum(counts), "mean": round(1e6 * mean, 1), "edge": edge, **values}


def _status(series: Sequence[Row]) -> dict[str, Any]:
    last = next((row["status"] for row in reversed(series) if row.get("status")), None)
    if last is None:
        return {}
    keys = ("transitions", "transition_seconds", "tokens_by_level", "errors", "pause_ms")
    first = series[0]["t_s"], series[-1]["t_s"]
    total = sum(last["transitions"].values())
    rate = {"transitions_total": total, "transitions_per_s": round(total / max(1.0, first[1]), 3)}
    pauses = [row["status"]["pause_ms"]["p50"] for row in series if row.get("status")]
    known = [pause for pause in pauses if pause is not None]
    return {**{key: last[key] for key in keys}, **rate, "pause_p50_ms": statistics.median(known) if known else None}


def _status_faults(series: Sequence[Row]) -> Iterable[str]:
    faults: tuple[tuple[Callable[[Row], bool], str], ...] = (
        (lambda status: status["level"] != 0, "not at level 0"),
        (lambda status: bool(status["failed"]), "the controller has failed"),
        (lambda status: bool(status["num_running"] or status["num_waiting"]), "requests are left, and nobody asks"),
        (lambda status: status["num_kv_blocks"] > status["mapped_kv_blocks"], "more blocks published than mapped"),
    )
    for row in series:
        if row.get("status") is None:
            yield f"no status at {row['t_s']:.0f} s"
            continue
        for is_so, words in faults:
            if is_so(row["status"]):
                yield f"at rest, at {row['t_s']:.0f} s: {words}"
    blocks = {row["status"]["num_kv_blocks"] for row in series if row.get("status")}
    if len(blocks) > 1:
        yield f"at rest there were {sorted(blocks)} blocks"


def _left(rows: Sequence[Row]) -> Iterable[str]:
    for row in rows:
        if row.get("left_over"):
            yield f"{len(row['left_over'])} processes outlived their server: {row['left_over'][0][:80]}"
