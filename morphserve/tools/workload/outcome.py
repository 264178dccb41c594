"""What a run leaves behind, replayed against a server or simulated: requests' outcomes, and the server over time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

OK, CUTOFF, TIMEOUT, ERROR = "ok", "cutoff", "timeout", "error"  # else "http_<status>"


@dataclass(slots=True)
class Outcome:
    """The end of one request. Times in seconds; `sent_s` counts from the start of the run."""

    index: int
    scheduled_s: float
    prompt_tokens: int  # as asked for; the server's count once it has told us
    asked_tokens: int
    sent_s: float | None = None  # None: the run ended before its time came
    ended_s: float | None = None  # None: unfinished at the cut-off
    status: str = CUTOFF
    ttft_s: float = 0.0
    latency_s: float = 0.0  # first byte sent to last token
    itls_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    # By token, where they were asked for: ids of the most probable ones with their log probabilities in nats.
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    token_levels: list[list[int]] = field(default_factory=list)  # [level, tokens], run by run, as the receipt tells
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was answered in full."""
        return self.status == OK

    @property
    def tpot_s(self) -> float:
        """(latency - TTFT) / (output tokens - 1); 0 for a single token, as vLLM's goodput has it."""
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def lag_s(self) -> float | None:
        """Seconds by which the client itself sent the request late."""
        return None if self.sent_s is None else self.sent_s - self.scheduled_s


@dataclass(frozen=True, slots=True)
class Replayed:
    """The outcomes in workload order, and the clock they were taken with."""

    outcomes: list[Outcome]
    started: float  # perf_counter at workload time 0
    duration_s: float  # first dispatch to last completion (or cut-off)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The server at one moment. None: the server does not tell. Counters are since its start."""

    t_s: float  # since the start of the run
    kv_usage: float | None = None
    running: int | None = None
    waiting: int | None = None
    preemptions: int | None = None
    level: int | None = None
    blocks_published: int | None = None  # null block included
    blocks_backed: int | None = None
    blocks_used: int | None = None
    layers: dict[str, int] = field(default_factory=dict)  # by format
    tokens_by_level: dict[str, int] = field(default_factory=dict)
    transitions: dict[str, int] = field(default_factory=dict)  # by "direction/outcome"
    transition_s: float | None = None
    errors: dict[str, int] = field(default_factory=dict)  # by place
    pause_max_ms: float | None = None

    @property
    def is_morphserve(self) -> bool:
        """Whether the plugin is on."""
        return self.level is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)
