"""One request inside the simulated engine, and one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class State(IntEnum):
    """The place of a request. Integers: they are compared in the hot path."""

    WAITING = 0
    PREFILL = 1  # running, and its tokens so far do not fit into one step: always the last of the running ones
    DECODE = 2  # running, one token a step
    ENDING = 3  # running, and the step that makes its last token is under way
    DONE = 4  # ended, aborted or refused


@dataclass(slots=True, eq=False)
class SimRequest:
    """A request as the scheduler's model keeps it.

    While it decodes nothing in here changes: before step `s` it has `base + s` tokens in the KV cache, and step
    `last_step` makes its last token.
    """

    index: int
    name: str
    prompt_tokens: int
    output_tokens: int  # exactly so many are made: ignore_eos
    arrival_s: float  # in the engine's queue
    state: State = State.WAITING
    generated: int = 0  # not kept up to date while it decodes
    computed: int = 0  # tokens in the KV cache; not kept up to date while it decodes
    base: int = 0
    joined: int = 0  # step that made the first token of the current run
    last_step: int = 0
    first_step: int = -1  # step that made its first token; -1 = none has
    runs: list[tuple[int, int]] = field(default_factory=list)  # (first step, tokens): one a step each
    preemptions: int = 0
    max_level: int | None = None  # it must not be served below that

    @property
    def is_done(self) -> bool:
        """Whether it has ended, was aborted or refused."""
        return self.state is State.DONE

    @property
    def num_tokens(self) -> int:
        """Tokens that must be in the KV cache before its next token. Not while it decodes."""
        return self.prompt_tokens + self.generated


@dataclass(slots=True)
class Batch:
    """One engine step: what it computes, and what is known once it has ended."""

    step: int
    num_seqs: int
    prefill_tokens: int  # beyond one token a sequence
    context_tokens: int  # in the KV cache after the step, of its sequences: what attention reads
    num_tokens: int  # that it makes
    ends: list[SimRequest]  # their last token is among them
    firsts: list[SimRequest]  # their first token is
    admitted: list[SimRequest]
    preempted: list[SimRequest]  # for want of blocks
