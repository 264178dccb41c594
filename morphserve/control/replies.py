"""What ranks answer: taken off the ring without blocking, checked, and remembered per rank."""

from __future__ import annotations

from dataclasses import dataclass, field

from morphserve.control.ports import Reply, Ticket
from morphserve.errors import MorphServeError

# Replies under way that nobody waits for one by one. The rings between engine and workers hold ten messages each way
# and dead-lock when both are full; a step under way takes two, and a pipeline has as many steps under way as stages.
# With the command that is waited for, eight stages fit.
_MAX_UNDRAINED = 3


class CommandFailed(MorphServeError, RuntimeError):
    """A rank answered ok=False to a command that cannot fail, so its state is unknown."""


@dataclass(frozen=True, slots=True)
class RankFigures:
    """The newest figures a rank reported."""

    num_kv_blocks: int  # mapped, null block included
    weight_bytes: int
    staging_bytes: int


@dataclass(slots=True)
class ReplyDesk:
    """Takes replies in: of the one command that is waited for, and of those that nobody waits for one by one."""

    ranks: dict[int, RankFigures] = field(default_factory=dict)
    pause_s: float = 0.0  # worker seconds in the replies taken since it was last set to 0
    copies: list[Ticket] = field(default_factory=list)
    late: list[Ticket] = field(default_factory=list)  # answers that nobody waits for any more; ranks still give them
    _awaited: Ticket | None = None
    _sent_s: float = 0.0  # when the awaited ticket's command was sent
    _said_late: bool = False  # that the ranks do not answer it

    @property
    def is_full(self) -> bool:
        """True when no further copies may be sent before replies have come."""
        return len(self.copies) + len(self.late) >= _MAX_UNDRAINED

    def expect(self, ticket: Ticket, now_s: float) -> None:
        """The command that is waited for from now on."""
        self._awaited, self._sent_s, self._said_late = ticket, now_s, False

    def answer(self) -> tuple[Reply, ...] | None:
        """All ranks' replies to the awaited command, None while one is missing. Given once."""
        if self._awaited is None:
            return None
        replies = self.poll(self._awaited)
        if replies is not None:
            self._awaited = None
        return replies

    def silence_s(self, now_s: float) -> float:
        """Since the awaited command was sent."""
        return now_s - self._sent_s

    def becomes_late(self, now_s: float, timeout_s: float) -> bool:
        """Is the awaited answer overdue now? True once a command."""
        if self._awaited is None or self._said_late or self.silence_s(now_s) <= timeout_s:
            return False
        self._said_late = True
        return True

    def give_up(self) -> None:
        """Nobody waits for the awaited answer any more."""
        if self._awaited is not None:
            self.late.append(self._awaited)
            self._awaited = None

    def poll(self, ticket: Ticket) -> tuple[Reply, ...] | None:
        """All ranks' replies, None while one is missing."""
        replies = ticket.poll()
        if replies is not None:
            self.pause_s += slowest(replies)
            for reply in replies:
                self.ranks[reply.rank] = RankFigures(
                    reply.num_kv_blocks, reply.weight_bytes, reply.staging_bytes
                )
        return replies

    def poll_copies(self) -> None:
        """Take the replies to copies that have come.

        Raises:
            CommandFailed: a rank could not copy.
        """
        waiting, self.copies = self.copies, []
        answered: list[Reply] = []
        for ticket in waiting:
            replies = self.poll(ticket)
            if replies is None:
                self.copies.append(ticket)
            else:
                answered.extend(replies)
        require_success(tuple(answered), "copy")

    def drop_late(self) -> None:
        """Take late answers off the ring without looking at them: their plan has been aborted."""
        self.late = [ticket for ticket in self.late if ticket.poll() is None]

    def drain(self) -> None:
        """Take all that has come off the ring without looking at it."""
        if self._awaited is not None and self._awaited.poll() is not None:
            self._awaited = None
        self.copies = [ticket for ticket in self.copies if ticket.poll() is None]
        self.drop_late()


def require_success(replies: tuple[Reply, ...], command: str) -> None:
    """Check the replies to a command that cannot fail.

    Raises:
        CommandFailed: a rank says it did.
    """
    if errors := failures(replies):
        raise CommandFailed(f"{command} cannot fail, but did: {errors}. The ranks may disagree now.")


def slowest(replies: tuple[Reply, ...]) -> float:
    """Seconds the slowest rank took: the others waited for it."""
    return max((reply.elapsed_s for reply in replies), default=0.0)


def failures(replies: tuple[Reply, ...]) -> str:
    """What the ranks that failed say, '' when none did."""
    return "; ".join(f"rank {reply.rank}: {reply.error}" for reply in replies if not reply.ok)
