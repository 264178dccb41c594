"""What the controller needs of the world. vLLM, the simulator and the tests implement these.

Neither torch nor vLLM is imported here: replay and tuning run the controller that serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Plan:
    """One message to every rank. All ranks carry it out between the same two forward passes.

    A plan with `layer_formats` is sent in two phases (prepare may fail, commit cannot), or, where one
    rank decides alone, as one `apply`. A plan without (KV only) has nothing that can fail and is
    committed at once.

    On commit a rank does, in this order: copy `copies` and rewrite its cached block tables; unmap
    when `num_kv_blocks` is below what it has mapped; switch the layers and free what they were; map
    and zero when `num_kv_blocks` is above.
    """

    revision: int  # rises; a rank refuses one it has already passed
    layer_formats: tuple[tuple[int, str], ...]  # (decoder layer id, format it gets)
    num_kv_blocks: int  # mapped on each rank after commit, null block included
    copies: tuple[tuple[int, int], ...] = ()  # (source, destination) block ids, disjoint sets


@dataclass(frozen=True, slots=True)
class Reply:
    """One rank's answer to prepare, commit or abort. A rank never raises: it answers ok=False."""

    rank: int
    revision: int
    ok: bool
    error: str = ""
    elapsed_s: float = 0.0  # by the rank's own clock, without what it waited for its turn
    num_kv_blocks: int = 0  # mapped on this rank now
    weight_bytes: int = 0  # resident morphable weights on this rank now
    staging_bytes: int = 0  # prepared but not yet committed
    kv_moved: bool = True  # False: copies or block tables may be half done, so what is in the KV is unknown
    pending: bool = False  # the rank goes on with it beside its forward passes: to be asked again


class Ticket(Protocol):
    """Replies on their way."""

    def poll(self) -> tuple[Reply, ...] | None:
        """All ranks' replies, or None while one is missing. Never blocks."""
        ...


class ExecutorPort(Protocol):
    """Sends commands to all ranks, in one order with the forward passes."""

    @property
    def num_ranks(self) -> int:
        """How many ranks must agree."""
        ...

    @property
    def in_background(self) -> bool:
        """Ranks prepare beside their forward passes, so that one too is told to prepare first and to commit later."""
        ...

    def prepare(self, plan: Plan) -> Ticket: ...

    def commit(self, plan: Plan) -> Ticket: ...

    def abort(self, plan: Plan) -> Ticket: ...

    def apply(self, plan: Plan) -> Ticket:
        """Commit in one command, for a single rank, whose own vote is all there is to wait for.

        It copies and unmaps, then prepares, then switches and maps. When preparing fails it answers
        ok=False: no layer has changed, but what was to be unmapped is.
        """
        ...


@dataclass(frozen=True, slots=True)
class ShrinkProgress:
    """What one call of `advance_shrink` did."""

    copies: tuple[tuple[int, int], ...]  # must reach every rank before the next forward pass
    num_live_tail: int  # blocks worth keeping still above the new end; 0 = finish_shrink may be called


class BlockPoolPort(Protocol):
    """The scheduler's block pool, as one thing that grows and shrinks at its end."""

    @property
    def num_kv_blocks(self) -> int:
        """Published blocks, null block included. Unchanged by begin/advance, lowered by finish."""
        ...

    @property
    def num_used_blocks(self) -> int:
        """Blocks that live requests hold (ref count above 0), without the null block."""
        ...

    def grow(self, num_kv_blocks: int) -> None:
        """Publish blocks up to `num_kv_blocks`. Only after every rank has mapped them."""
        ...

    def begin_shrink(self, num_kv_blocks: int) -> None:
        """From now on the pool offers no more blocks than that; fenced ones, with higher ids, never again."""
        ...

    def advance_shrink(self, max_copies: int) -> ShrinkProgress:
        """Fence tail blocks freed since, and rename up to `max_copies` of those worth keeping downwards."""
        ...

    def preempt_one(self) -> bool:
        """Put the running request that costs least to compute again back to the waiting ones; False = none can go."""
        ...

    def finish_shrink(self) -> None:
        """Forget the fenced tail. Every tail block must be free (num_live_tail == 0)."""
        ...

    def cancel_shrink(self) -> None:
        """Give the fenced blocks back to the scheduler. Renames already done stay (harmless)."""
        ...


@dataclass(frozen=True, slots=True)
class EngineView:
    """Counters read from the engine at a step boundary, all O(1)."""

    num_waiting: int
    num_running: int
    oldest_wait_s: float
