"""What the controller needs of the world: ranks that carry out plans and answer, a block pool, an engine's counters.

vLLM, the simulator and the tests implement the ports: replay and tuning run the controller that serves. What ranks
answer is taken off the ring without blocking, checked, and remembered per rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from morphserve.errors import MorphServeError

LayerFormats = tuple[tuple[int, str], ...]  # (decoder layer id, format it gets)

# Replies under way that nobody waits for one by one. The rings between engine and workers hold ten messages each way
# and dead-lock when both are full; a step under way takes two, and a pipeline has as many steps under way as stages.
# With the command that is waited for, eight stages fit.
_MAX_UNDRAINED = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """One message to every rank. All ranks carry it out between the same two forward passes.

    A plan with `layer_formats` is sent in two phases: prepare may fail, commit cannot. A plan without (KV only) has
    nothing that can fail and is committed at once. So is a plan that is `alone`: its one rank, whose own vote is all
    there is to wait for, prepares within the commit, which may then fail: no layer has changed, but what was to be
    unmapped is.

    On commit a rank does, in this order: copy `copies` and rewrite its cached block tables; switch the layers; unmap
    when `num_kv_blocks` is below what it has mapped; give back what the layers were; map and zero when it is above.
    One that is `alone` unmaps before it prepares.
    """

    revision: int  # rises; a rank refuses one it has already passed
    layer_formats: LayerFormats
    num_kv_blocks: int  # mapped on each rank after commit, null block included
    copies: tuple[tuple[int, int], ...] = ()  # (source, destination) block ids, disjoint sets
    alone: bool = False  # one rank decides alone


@dataclass(frozen=True, slots=True)
class Reply:
    """One rank's answer to prepare, commit or abort. A rank never raises: it answers ok=False."""

    rank: int
    revision: int
    ok: bool
    error: str = ""  # where it is ok: why it has fewer KV blocks than it was asked for
    elapsed_s: float = 0.0  # by the rank's own clock, without what it waited for its turn
    num_kv_blocks: int = 0  # mapped on this rank now
    weight_bytes: int = 0  # resident morphable weights on this rank now
    staging_bytes: int = 0  # prepared but not yet committed
    kv_moved: bool = True  # False: copies or block tables may be half done, so what is in the KV is unknown
    pending: bool = False  # the rank goes on with it beside its forward passes: to be asked again


class Ticket(Protocol):
    """Replies on their way."""

    def poll(self) -> tuple[Reply, ...] | None:
        """Return all ranks' replies, or None while one is missing. Never blocks."""
        ...


class ExecutorPort(Protocol):
    """The way to all ranks: commands, in one order with the forward passes."""

    @property
    def num_ranks(self) -> int:
        """The number of ranks that must agree."""
        ...

    @property
    def in_background(self) -> bool:
        """Whether ranks prepare beside their forward passes: then one, too, prepares first and commits later."""
        ...

    def prepare(self, plan: Plan) -> Ticket: ...

    def commit(self, plan: Plan) -> Ticket: ...

    def abort(self, plan: Plan) -> Ticket: ...


@dataclass(frozen=True, slots=True)
class ShrinkProgress:
    """The result of one call of `advance_shrink`."""

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
        """Offer no more blocks than that from now on; fenced ones, with higher ids, never again."""
        ...

    def advance_shrink(self, max_copies: int) -> ShrinkProgress:
        """Fence tail blocks freed since, and rename up to `max_copies` of those worth keeping downwards."""
        ...

    def discard_contents(self) -> None:
        """Have nobody read what is in the blocks: running requests start over, and the prefix cache is empty.

        Raises:
            Exception: somebody still holds a block. Then nothing may be served from this cache any more.
        """
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


class CommandFailed(MorphServeError, RuntimeError):
    """A rank answered ok=False to a command that cannot fail. What is served from is as it was, on all ranks."""


class RanksUnknown(CommandFailed):
    """The same, and what a rank holds is unknown, or may differ from what others hold: nothing may be served of it."""


@dataclass(frozen=True, slots=True)
class RankFigures:
    """The newest figures that a rank reported."""

    num_kv_blocks: int  # mapped, null block included
    weight_bytes: int
    staging_bytes: int


@dataclass(slots=True)
class _Held:
    """A ticket whose replies may be looked at before somebody takes them."""

    ticket: Ticket
    replies: tuple[Reply, ...] | None = None

    def poll(self) -> tuple[Reply, ...] | None:
        if self.replies is None:
            self.replies = self.ticket.poll()
        return self.replies

    @property
    def has_failed(self) -> bool:
        return any(not reply.ok for reply in self.poll() or ())


@dataclass(slots=True)
class ReplyTracker:
    """The replies of the one command that is waited for, and of those that nobody waits for one by one."""

    ranks: dict[int, RankFigures] = field(default_factory=dict)
    before: dict[int, RankFigures] = field(default_factory=dict)  # as they were before the replies taken last
    pause_s: float = 0.0  # worker seconds in the replies taken since it was last set to 0
    copies: list[_Held] = field(default_factory=list)
    late: list[_Held] = field(default_factory=list)  # answers that nobody waits for any more; ranks still give them
    _awaited: _Held | None = None
    _sent_s: float = 0.0  # when the awaited ticket's command was sent
    _said_late: bool = False  # that the ranks do not answer it

    @property
    def is_full(self) -> bool:
        """Whether no further copies may be sent before replies have come."""
        return len(self.copies) + len(self.late) >= _MAX_UNDRAINED

    def expect(self, ticket: Ticket, now_s: float) -> None:
        """Wait for this command from now on."""
        self._awaited, self._sent_s, self._said_late = _Held(ticket), now_s, False

    def expect_copies(self, ticket: Ticket) -> None:
        """Take the answer to this command whenever it comes."""
        self.copies.append(_Held(ticket))

    @property
    def has_failed(self) -> bool:
        """Whether the answer that is waited for has come, and some rank says no. It can still be taken."""
        return self._awaited is not None and self._awaited.has_failed

    @property
    def has_failed_copies(self) -> bool:
        """Whether an answer to copies has come, and some rank says no. It can still be taken."""
        return any(ticket.has_failed for ticket in self.copies)

    def answer(self) -> tuple[Reply, ...] | None:
        """Return all ranks' replies to the awaited command, None while one is missing. Given once."""
        if self._awaited is None:
            return None
        replies = self.poll(self._awaited)
        if replies is not None:
            self._awaited = None
        return replies

    def silence_s(self, now_s: float) -> float:
        """Return the seconds since the awaited command was sent."""
        return now_s - self._sent_s

    def becomes_late(self, now_s: float, timeout_s: float) -> bool:
        """Return whether the awaited answer is overdue now. True once a command."""
        if self._awaited is None or self._said_late or self.silence_s(now_s) <= timeout_s:
            return False
        self._said_late = True
        return True

    def give_up(self) -> None:
        """Wait for the awaited answer no more."""
        if self._awaited is not None:
            self.late.append(self._awaited)
            self._awaited = None

    def poll(self, ticket: _Held) -> tuple[Reply, ...] | None:
        """Return all ranks' replies, None while one is missing."""
        replies = ticket.poll()
        if replies is not None:
            self.pause_s += slowest(replies)
            self.before = dict(self.ranks)
            for reply in replies:
                self.ranks[reply.rank] = RankFigures(
                    reply.num_kv_blocks, reply.weight_bytes, reply.staging_bytes
                )
        return replies

    def poll_copies(self) -> tuple[Reply, ...]:
        """Take the replies to copies that have come; the first that a rank said no to, if there is one."""
        waiting, self.copies = self.copies, []
        failed: tuple[Reply, ...] = ()
        for ticket in waiting:
            replies = () if failed else self.poll(ticket)
            if replies is None or failed:
                self.copies.append(ticket)
            elif failures(replies):
                failed = replies
        return failed

    def drop_late(self) -> None:
        """Take late answers off the ring without looking at them: their plan has been aborted."""
        self.late = [ticket for ticket in self.late if ticket.poll() is None]

    def drop_copies(self) -> None:
        """Wait for no answer to copies any more: what they moved is of no use to anybody."""
        self.late += self.copies
        self.copies = []


def slowest(replies: tuple[Reply, ...]) -> float:
    """Return the seconds that the slowest rank took: the others waited for it."""
    return max((reply.elapsed_s for reply in replies), default=0.0)


def failures(replies: tuple[Reply, ...]) -> str:
    """Join what the ranks that failed say, '' when none did."""
    return "; ".join(f"rank {reply.rank}: {reply.error}" for reply in replies if not reply.ok)
