"""Readers of request traces: Mooncake JSONL, Azure, BurstGPT and Vidur CSV."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from morphserve.tools.workload.errors import WorkloadError
from morphserve.user_input import user_path

MOONCAKE_BLOCK_TOKENS = 512  # tokens that one hash id of a Mooncake trace stands for
_LATEST_START_S = 3600.0  # of what is replayed as it is: a later one is a time of day, not of a workload
_MOST_TOKENS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace."""

    arrival_s: float  # since the first request of the trace, or the start of the cut window
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()  # equal ids = equal prompt blocks; empty = nothing known


Row = dict[str, str]
_Reader = Callable[[Row], tuple[float, int, int] | None]


def read_trace(path: str | Path, seed: int = 0) -> list[TraceRequest]:
    """Read a trace in arrival order, its first request at 0.

    Args:
        path: `.jsonl` in Mooncake's form, or a CSV of Azure, BurstGPT (6 or 8 columns) or Vidur.
        seed: for the place inside the second of traces that only give whole seconds.

    Raises:
        WorkloadError: unreadable or empty file, unknown columns, a bad line (with its number).
    """
    file = user_path(path)
    if file.suffix in (".yaml", ".yml"):
        raise WorkloadError(f"{file} is a list of windows: `morphserve sweep --window {path}` takes it.")
    with _opened(file) as stream:
        is_jsonl = file.suffix in (".jsonl", ".json")
        requests = _in_order(_read_jsonl(stream, file) if is_jsonl else _read_csv(stream, file, seed), file)
    first = requests[0].arrival_s
    return [TraceRequest(r.arrival_s - first, r.input_tokens, r.output_tokens, r.hash_ids) for r in requests]


def read_canonical(path: str | Path) -> list[TraceRequest]:
    """Read a Mooncake JSONL without re-basing: a cut window starts at its own 0, not at its first request.

    Raises:
        WorkloadError: as `read_trace`; a first request before 0 or long after it.
    """
    file = user_path(path)
    with _opened(file) as stream:
        requests = _in_order(_read_jsonl(stream, file), file)
    first_s = requests[0].arrival_s
    if not 0 <= first_s <= _LATEST_START_S:
        raise WorkloadError(
            f"workload {file}: its first request comes at {first_s:g} s, must be 0 to {_LATEST_START_S:g} s. Cut it "
            "with --window 0,SECONDS, which counts from the first request."
        )
    return requests


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Iterator[str]]:
    """Yield the lines of a text file; what is wrong with it becomes a WorkloadError."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            yield stream
    except OSError as e:
        raise WorkloadError(f"workload {file}: {e.strerror}. Give a readable JSONL or CSV file.") from e
    except UnicodeDecodeError as e:
        raise WorkloadError(f"workload {file}: not UTF-8 text ({e.reason} at byte {e.start}).") from e
    except csv.Error as e:
        raise WorkloadError(f"workload {file}: not a CSV file ({e}).") from e


def _in_order(requests: Iterator[TraceRequest], file: Path) -> list[TraceRequest]:
    found = sorted(requests, key=lambda r: r.arrival_s)
    if not found:
        raise WorkloadError(f"workload {file}: no requests in it.")
    return found


def _read_jsonl(stream: Iterator[str], file: Path) -> Iterator[TraceRequest]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            request = TraceRequest(
                arrival_s=_seconds(raw["timestamp"], 1000.0),
                input_tokens=_count(raw["input_length"]),
                output_tokens=_count(raw["output_length"]),
                hash_ids=tuple(int(h) for h in raw.get("hash_ids") or ()),
            )
        except KeyError as e:
            raise WorkloadError(
                f"{file}:{number}: key {e.args[0]!r} is missing. A line needs timestamp (ms), "
                "input_length and output_length."
            ) from e
        except (TypeError, ValueError, OverflowError, AttributeError, RecursionError) as e:
            raise WorkloadError(f"{file}:{number}: {e}. Got: {line.strip()[:80]!r}") from e
        yield request


def _read_csv(stream: Iterator[str], file: Path, seed: int) -> Iterator[TraceRequest]:
    rows = csv.DictReader(stream)
    columns = [c.strip() for c in rows.fieldnames or ()]
    rows.fieldnames = columns
    read = _reader_for(columns, seed)
    if read is None:
        raise WorkloadError(
            f"{file}:1: columns {columns} are none of the known layouts: "
            + "; ".join(", ".join(need) for need, _ in _LAYOUTS)
            + "."
        )
    for row in rows:
        try:
            if None in row or None in row.values():
                raise ValueError(f"line does not have the header's {len(columns)} columns")
            parsed = read(row)
        except (ValueError, OverflowError) as e:
            raise WorkloadError(f"{file}:{rows.line_num}: {e}.") from e
        if parsed is not None:
            yield TraceRequest(*parsed)


def _reader_for(columns: list[str], seed: int) -> _Reader | None:
    for need, make in _LAYOUTS:
        if set(need) <= set(columns):
            return make(seed)
    return None


def _azure(_seed: int) -> _Reader:
    def read(row: Row) -> tuple[float, int, int]:
        at = datetime.fromisoformat(row["TIMESTAMP"].strip())
        return at.timestamp(), _count(row["ContextTokens"]), _count(row["GeneratedTokens"])

    return read


def _burstgpt(seed: int) -> _Reader:
    rng = random.Random(seed)

    def read(row: Row) -> tuple[float, int, int] | None:
        # Whole seconds pile requests up; spread them inside their second.
        at = _seconds(row["Timestamp"]) + rng.random()
        output = _count(row["Response tokens"])
        if output == 0:
            return None  # BurstGPT's mark of a request that failed
        return at, _count(row["Request tokens"]), output

    return read


def _vidur(_seed: int) -> _Reader:
    def read(row: Row) -> tuple[float, int, int]:
        return _seconds(row["arrived_at"]), _count(row["num_prefill_tokens"]), _count(row["num_decode_tokens"])

    return read


_LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[int], _Reader]], ...] = (
    (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _azure),
    (("Timestamp", "Request tokens", "Response tokens"), _burstgpt),
    (("arrived_at", "num_prefill_tokens", "num_decode_tokens"), _vidur),
)


def _seconds(value: str | float, per_second: float = 1.0) -> float:
    seconds = float(value) / per_second
    if not math.isfinite(seconds):
        raise ValueError(f"time is {value!r}, must be a number")
    return seconds


def _count(value: object) -> int:
    number = float(value) if isinstance(value, int | float | str) else float("nan")
    if not number.is_integer() or number < 0:
        raise ValueError(f"token count is {value!r}, must be a whole number of at least 0")
    if number > _MOST_TOKENS:
        raise ValueError(f"token count is {number:g}, at most {_MOST_TOKENS:,}: no request has more")
    return int(number)
