"""What a policy sees and what it answers. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, Protocol

BASE_FORMAT = "base"  # a layer as it was loaded: the full-precision weights
_LAST_DIGITS = re.compile(r"[0-9]+$")


def bits_of(fmt: str) -> int:
    """Return the bits of one weight in a format: every format's name ends in them, as its registry sees to.

    Raises:
        ValueError: no format has such a name.
    """
    found = _LAST_DIGITS.search(fmt)
    if found is None:
        raise ValueError(f"format {fmt!r} does not end in its bits, as w8 does. Name a format that there is.")
    return int(found[0])


@dataclass(frozen=True, slots=True)
class MorphLevel:
    """One level of the ladder: which format each decoder layer has, and what that buys."""

    index: int  # 0 = every layer at full precision
    # Format by decoder layer id, BASE_FORMAT where untouched; "w8/base" where attention and MLP differ.
    layer_formats: tuple[str, ...]
    weight_bytes: int  # per rank, the morphable linears of all decoder layers
    num_kv_blocks: int  # per rank, null block included
    expected_kl: float | None = None  # nats per token against level 0; None = never measured
    # (sequences in a step, what the decoder layers' linears then take over what they take at level 0), ascending, as
    # measured on this machine; empty = never measured.
    time_factors: tuple[tuple[int, float], ...] = ()

    @property
    def formats(self) -> frozenset[str]:
        """Formats that any layer or half of a layer has."""
        return frozenset(half for fmt in self.layer_formats for half in fmt.split("/"))

    @property
    def min_bits(self) -> int | None:
        """Fewest bits of any weight that is not as it was loaded; None where all are."""
        return min((bits_of(fmt) for fmt in self.formats if fmt != BASE_FORMAT), default=None)

    def layers_by_format(self) -> dict[str, int]:
        """Return the number of decoder layers in each format."""
        counts: dict[str, int] = {}
        for fmt in self.layer_formats:
            counts[fmt] = counts.get(fmt, 0) + 1
        return counts


Ladder = tuple[MorphLevel, ...]  # ladder[k].index == k; num_kv_blocks never decreases with k


@dataclass(frozen=True, slots=True)
class Cohort:
    """Neighbours in the waiting queue, so alike that one prediction serves them all."""

    num_requests: int
    num_tokens: int  # all of them together: prompts, and what preempted ones had generated
    first_arrival_s: float  # monotonic clock
    last_arrival_s: float
    ttft_s: float | None = None  # the mean of their own limits, which are about the same; None = the policy's
    tpot_s: float | None = None  # likewise, of those that have a token
    has_token: bool = False  # preempted: their first token is out, what suffers is the time per token


@dataclass(frozen=True, slots=True)
class OwnLimit:
    """Running requests that brought about the same limit."""

    limit_s: float  # their mean
    num_requests: int


@dataclass(frozen=True, slots=True)
class StepLoad:
    """The load of the engine step before this boundary, and the time it took."""

    seconds: float  # from its boundary to the next
    num_seqs: int
    prefill_tokens: int  # beyond one token per sequence
    context_tokens: int  # KV that its attention read
    level: int  # that it ran at


OrderKind = Literal["pin", "max", "restore", "pause", "drain"]


@dataclass(frozen=True, slots=True)
class Order:
    """What an operator has ordered, and is in force: an input of the decision, see `orders.py`."""

    kind: OrderKind
    level: int  # to be at; of kind max: to go no deeper than
    reason: str  # in words a log reader understands

    @property
    def is_exact(self) -> bool:
        """Whether it leaves the policy no choice."""
        return self.kind != "max"

    @property
    def closes_door(self) -> bool:
        """Whether new requests are refused."""
        return self.kind == "drain"


@dataclass(frozen=True, slots=True)
class Signals:
    """The engine as a policy sees it at one step boundary."""

    now_s: float  # monotonic clock
    level: int  # committed level
    target_level: int  # where the transition in progress is heading; == level when idle
    num_kv_blocks: int  # published to the scheduler, null block included
    used_kv_blocks: int  # held by live requests; cached-but-free blocks do not count
    num_waiting: int  # requests that wait for admission, preempted ones included
    num_running: int
    oldest_wait_s: float  # age of the head of the waiting queue, 0 when empty
    preemptions: int  # since start
    preemption_rate: float  # per second, over the monitor's window
    arrival_rate: float  # requests per second, over the monitor's window
    queue_delay_s: float  # EWMA of the wait between arrival and first schedule
    ttft_s: float  # EWMA
    tpot_s: float  # EWMA
    step_s: float  # EWMA of the time between two engine steps that had work
    blocks_per_request: float  # EWMA of the blocks a request held when it ended; 0 = unknown
    waiting: tuple[Cohort, ...] = ()  # who waits, next one first
    last_step: StepLoad | None = None  # None: none yet, or something other than the step took part of that time
    prompt_tokens: float = 0.0  # EWMA over requests that arrived; 0 = unknown
    output_tokens: float = 0.0  # EWMA over requests that ended; 0 = unknown
    num_arrivals: int = 0  # since start
    running_limits: tuple[OwnLimit, ...] = ()  # on the time per token, of running requests that bring one
    order: Order | None = None  # of an operator, in force now
    max_level: int | None = None  # shallowest of the levels that requests which are here must not be served below
    max_level_alone: bool = False  # nobody else is here

    @property
    def kv_usage(self) -> float:
        """Share of the published blocks that live requests hold, [0, 1]."""
        usable = self.num_kv_blocks - 1  # the null block is never handed out
        return self.used_kv_blocks / usable if usable > 0 else 1.0


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The engine's own settings that a prediction needs."""

    block_size: int  # tokens per KV block
    max_num_seqs: int
    max_num_batched_tokens: int  # of one step
    moves_beside_steps: bool = False  # a device brings layers in beside its steps; else a core does between them
    sends_ahead: bool = False  # a step is read once the next one is sent (asynchronous scheduling)


@dataclass(frozen=True, slots=True)
class Decision:
    """The level a policy wants, and why, in words a log reader understands."""

    level: int
    reason: str
    max_queued_tokens: int | None = None  # refuse requests beyond this queue; None = take all
    min_floor: int = 0  # refuse requests that ask not to be served below a shallower level than this; 0 = take all
    # The policy will never say anything else: an idle engine need not ask it. No part of the answer, so not compared.
    is_final: bool = field(default=False, compare=False)


# Step times as calibrated; learned from the engine's own steps, or from too few of them as yet; either, but wrong of
# late, or of no use: no level keeps the promise. While learning, distrusted or unkeepable, thresholds decide.
Predictions = Literal["calibrated", "learning", "learned", "distrusted", "unkeepable"]


class Policy(Protocol):
    """One pure question. Same signals in the same order, same answers, live or replayed."""

    @property
    def predictions(self) -> Predictions | None:
        """What its predictions are made of; None = it makes none."""
        ...

    @property
    def max_level(self) -> int:
        """The deepest level that its own bounds allow now; nobody's order goes beyond."""
        ...

    def decide(self, signals: Signals) -> Decision: ...
