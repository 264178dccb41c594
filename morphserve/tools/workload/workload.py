"""Cut, thin, scale and save a workload. The form on disk is Mooncake JSONL."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from morphserve.shipped import workload_file
from morphserve.tools.options import number, option, pair
from morphserve.tools.workload import synthetic
from morphserve.tools.workload.errors import WorkloadError
from morphserve.tools.workload.formats import MOONCAKE_BLOCK_TOKENS, TraceRequest, read_canonical, read_trace

_MOST_SCALE = 1e6


def _factor(help: str, metavar: str, unset: bool = False) -> Any:
    return option(help, default=1.0, unset=unset, type=number, metavar=metavar)


def _bounds(help: str) -> Any:
    return option(help, default=None, type=pair(int, "LO,HI in tokens"), metavar="LO,HI")


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """The part of a trace to replay; the defaults replay all of it as it is."""

    path: Path = option(
        "Mooncake JSONL, or a CSV of Azure, BurstGPT or Vidur; " + synthetic.HELP,
        flag="--workload",
        type=workload_file,
        metavar="FILE",
    )
    # Start and length. The cut is re-based to 0.
    window_s: tuple[float, float] | None = option(
        "cut these seconds and re-base them to 0",
        default=None,
        flag="--window",
        type=pair(float, "START,LEN in seconds"),
        metavar="START,LEN",
    )
    thin: float = _factor(
        "keep every K-th request (keeps burst durations); default: 1, or as --fit finds", "K", unset=True
    )
    # Every arrival time is divided by it: bursts get shorter, too.
    rate_scale: float = _factor(
        "divide all arrival times by R (time stretching); default: 1, or as --fit finds", "R", unset=True
    )
    input_scale: float = _factor("multiply prompt lengths, e.g. 1/16", "F")
    input_clip: tuple[int, int] | None = _bounds("bounds of prompt lengths, tokens")
    output_scale: float = _factor("multiply output lengths", "F")
    output_clip: tuple[int, int] | None = _bounds("bounds of output lengths, tokens")
    limit: int | None = option(
        "stop after the first N requests", default=None, flag="--num-requests", type=int, metavar="N"
    )
    seed: int = option("of the prompts", default=0)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in arrival order, ready to be sent."""

    name: str
    requests: tuple[TraceRequest, ...]
    block_tokens: int  # tokens one hash id stands for, after input scaling

    @property
    def span_s(self) -> float:
        """Arrival of the last request."""
        return self.requests[-1].arrival_s

    @property
    def input_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(r.input_tokens for r in self.requests)

    @property
    def output_tokens(self) -> int:
        """Tokens all requests ask for."""
        return sum(r.output_tokens for r in self.requests)


def load_workload(spec: WorkloadSpec) -> Workload:
    """Read `spec.path` and apply the spec, in the order of its fields.

    Raises:
        WorkloadError: unreadable file, a bad line, an option out of bounds, or nothing left.
    """
    _check(spec)
    # A saved window must replay as it was saved: its lead-in silence belongs to it.
    canonical = spec.window_s is None and spec.path.suffix in (".jsonl", ".json")
    name = str(spec.path)
    if synthetic.is_synthetic(name):
        requests = synthetic.generate(synthetic.parse_synthetic(name))
    else:
        name = spec.path.stem
        requests = read_canonical(spec.path) if canonical else read_trace(spec.path, spec.seed)
    if spec.window_s is not None:
        requests = _cut(requests, *spec.window_s)
    requests = _thin(requests, spec.thin)[: spec.limit]
    if not requests:
        raise WorkloadError(
            f"workload {spec.path}: nothing left after window {spec.window_s}, thin {spec.thin:g}."
        )
    return Workload(
        name=name,
        requests=tuple(
            TraceRequest(
                arrival_s=r.arrival_s / spec.rate_scale,
                input_tokens=_length(r.input_tokens, spec.input_scale, spec.input_clip),
                output_tokens=_length(r.output_tokens, spec.output_scale, spec.output_clip),
                hash_ids=r.hash_ids,
            )
            for r in requests
        ),
        block_tokens=max(1, round(MOONCAKE_BLOCK_TOKENS * spec.input_scale)),
    )


def check_fits(workload: Workload, max_model_len: int) -> None:
    """Refuse a workload with a request that the server would refuse.

    Raises:
        WorkloadError: a prompt and its output together exceed `max_model_len` tokens.
    """
    too_long = [r for r in workload.requests if r.input_tokens + r.output_tokens > max_model_len]
    if too_long:
        worst = max(too_long, key=lambda r: r.input_tokens + r.output_tokens)
        raise WorkloadError(
            f"{workload.name}: {len(too_long)} of {len(workload.requests)} requests exceed max_model_len "
            f"{max_model_len} (longest: {worst.input_tokens} in + {worst.output_tokens} out). "
            "Shorten them with --input-scale, --input-clip, --output-clip, or raise --max-model-len."
        )


def save_workload(workload: Workload, path: str | Path) -> None:
    """Write Mooncake JSONL that vLLM's timed_trace, guidellm and aiperf replay as well.

    Hash ids are kept where each still stands for 512 tokens and all requests have them; else every
    request gets ids of its own (a scaled prompt no longer has the prefix its old ids promise).
    """
    keep = workload.block_tokens == MOONCAKE_BLOCK_TOKENS and all(
        len(r.hash_ids) * MOONCAKE_BLOCK_TOKENS >= r.input_tokens for r in workload.requests
    )
    fresh = itertools.count()
    lines = []
    for r in workload.requests:
        num_blocks = math.ceil(r.input_tokens / MOONCAKE_BLOCK_TOKENS)
        ids = list(r.hash_ids[:num_blocks]) if keep else list(itertools.islice(fresh, num_blocks))
        lines.append(
            json.dumps(
                {
                    "timestamp": round(r.arrival_s * 1000),
                    "input_length": r.input_tokens,
                    "output_length": r.output_tokens,
                    "hash_ids": ids,
                }
            )
        )
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cut(requests: Iterable[TraceRequest], start_s: float, length_s: float) -> list[TraceRequest]:
    return [
        replace(r, arrival_s=r.arrival_s - start_s)
        for r in requests
        if start_s <= r.arrival_s < start_s + length_s
    ]


def _thin(requests: list[TraceRequest], k: float) -> list[TraceRequest]:
    """Keep every k-th request: positions ceil(0), ceil(k), ceil(2k), ..."""
    positions = itertools.takewhile(
        lambda i: i < len(requests), (math.ceil(j * k) for j in itertools.count())
    )
    return [requests[i] for i in positions]


def _length(tokens: int, scale: float, clip: tuple[int, int] | None) -> int:
    scaled = round(tokens * scale)
    if clip is not None:
        scaled = min(max(scaled, clip[0]), clip[1])
    return max(scaled, 1)  # an empty prompt or answer is no request


def _check(spec: WorkloadSpec) -> None:
    for flag, value in (
        ("--thin", spec.thin),
        ("--rate-scale", spec.rate_scale),
        ("--input-scale", spec.input_scale),
        ("--output-scale", spec.output_scale),
    ):
        if not 1 / _MOST_SCALE <= value <= _MOST_SCALE:
            raise WorkloadError(f"{flag} is {value:g}, must be {1 / _MOST_SCALE:g} to {_MOST_SCALE:g}.")
    if spec.thin < 1:
        raise WorkloadError(
            f"--thin is {spec.thin:g}, must be at least 1; more load comes from --rate-scale."
        )
    if spec.window_s is not None and (spec.window_s[0] < 0 or spec.window_s[1] <= 0):
        raise WorkloadError(f"--window is {spec.window_s}, needs a start of at least 0 and a length above 0.")
    for flag, clip in (("--input-clip", spec.input_clip), ("--output-clip", spec.output_clip)):
        if clip is not None and not 1 <= clip[0] <= clip[1]:
            raise WorkloadError(f"{flag} is {clip[0]},{clip[1]}, needs 1 <= LO <= HI.")
    if spec.limit is not None and spec.limit < 1:
        raise WorkloadError(f"--num-requests is {spec.limit}, must be at least 1.")
