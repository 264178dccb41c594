"""Carries out one chunk at a time: a few layers, and the KV blocks they pay for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from morphserve.config import MorphServeConfig
from morphserve.controller.ledger import Ledgers
from morphserve.controller.picking import LayerFormats, LayerPicker
from morphserve.controller.ports import BlockPoolPort, ExecutorPort, Plan, Reply, Ticket
from morphserve.controller.replies import CommandFailed, ReplyDesk, failures, require_success, slowest
from morphserve.controller.transition import Direction, Outcome, Phase, check_move
from morphserve.errors import ConfigError
from morphserve.rank_bytes import RankBytes, paid_blocks
from policies.types import Ladder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChunkEnd:
    """How a chunk ended. `committed`: now nearer to `toward`. Else everything is as before it began."""

    outcome: Outcome
    num_layers: int = 0
    format: str = ""
    error: str = ""
    place: str = "prepare"  # what an abort counts as among the errors; "" = as none


@dataclass(slots=True)
class _Chunk:
    toward: int  # the rung it approaches
    direction: Direction
    layers: LayerFormats
    new_bytes: tuple[int, ...]  # by rank: staged
    old_bytes: tuple[int, ...]  # by rank: freed on commit
    blocks_before: int
    blocks_after: int
    revision: int
    plan: Plan | None = None
    ticket: Ticket | None = None
    sent_s: float = 0.0  # when the ticket's command was sent
    said_late: bool = False  # that the ranks do not answer it
    progress_s: float = 0.0  # when draining last got anywhere
    num_live_tail: int = -1
    worker_s: float = 0.0  # what prepare took on the slowest rank
    end: ChunkEnd | None = None
    exposure_before: int = 0  # what tokens count at if the switch fails


@dataclass(slots=True)
class ChunkRunner:
    """The level as it really is, layer by layer, and the one chunk under way.

    Promises:
        1. `pool.grow` is called with no more blocks than every rank has answered to have mapped.
        2. A rank is told to unmap only blocks that `pool.finish_shrink` has forgotten.
        3. The ledgers hold every byte before a rank is asked to make it resident.
        4. Copies leave for the ranks within the call that renamed the blocks.
        5. No rank is told to switch before all have prepared, within `transition.rank_timeout_s`.

    Attributes:
        lower: deepest level whose formats all layers have at least.
        upper: the level to count tokens at: == lower on a rung, else the rung below.
    """

    ladder: Ladder
    ranks: Sequence[RankBytes]
    pool: BlockPoolPort
    executor: ExecutorPort
    ledgers: Ledgers
    config: MorphServeConfig
    phase: Phase = Phase.IDLE
    lower: int = 0
    upper: int = 0
    revision: int = 0
    short_grows: int = 0
    forced_preemptions: int = 0
    _preempted: int = 0  # on the way back from the deepest level so far
    desk: ReplyDesk = field(default_factory=ReplyDesk)
    formats: list[str] = field(init=False)
    _picker: LayerPicker = field(init=False)
    _chunk: _Chunk | None = None
    _now_s: float = 0.0

    def __post_init__(self) -> None:
        base = self.ladder[0]
        for level in self.ladder:
            found = max(rank.weight(level.layer_formats) for rank in self.ranks)
            if found != level.weight_bytes:
                raise ConfigError(
                    f"level {level.index} has weight_bytes {level.weight_bytes}, its layers sum to {found}. "
                    "Build the ladder from the same bytes."
                )
        if self.pool.num_kv_blocks != base.num_kv_blocks:
            raise ConfigError(
                f"the block pool starts with {self.pool.num_kv_blocks} blocks, level 0 has "
                f"{base.num_kv_blocks}. Set kv.base_num_blocks to what the pool has."
            )
        self.formats = list(base.layer_formats)
        self._picker = LayerPicker(self.ranks, self.ledgers, self.config.transition)

    # ---- questions

    def next_rung(self, target: int) -> int | None:
        """The rung to approach on the way to `target`; None = we are there."""
        if self.lower != self.upper:
            return self.upper if target >= self.upper else self.lower
        if target == self.lower:
            return None
        return self.lower + (1 if target > self.lower else -1)

    def next_revision(self) -> int:
        """A number that every rank has yet to see."""
        self.revision += 1
        return self.revision

    # ---- the chunk

    def start(self, now_s: float, rung: int) -> None:
        """Open a chunk toward `rung`, a neighbour as `next_rung` names it. Follow with `advance`."""
        self._now_s = now_s
        direction: Direction = "degrade" if rung > self.lower else "restore"
        if direction == "degrade":
            self._preempted = 0
        layers = self._picker.pick(self.formats, self.ladder[rung].layer_formats, direction)
        after = list(self.formats)
        for layer, fmt in layers:
            after[layer] = fmt
        base, deeper = self.ladder[0], self.ladder[max(rung, self.upper)]
        paid = base.num_kv_blocks + paid_blocks(self.ranks, base.layer_formats, after)
        chunk = _Chunk(
            toward=rung,
            direction=direction,
            layers=layers,
            new_bytes=tuple(sum(rank.layers[fmt][layer] for layer, fmt in layers) for rank in self.ranks),
            old_bytes=tuple(
                sum(rank.layers[self.formats[layer]][layer] for layer, _ in layers) for rank in self.ranks
            ),
            blocks_before=self.pool.num_kv_blocks,
            blocks_after=min(paid, deeper.num_kv_blocks),
            revision=self.next_revision(),
            progress_s=now_s,
        )
        self._chunk = chunk
        if chunk.blocks_after < chunk.blocks_before:
            self.pool.begin_shrink(chunk.blocks_after)
            self._move(Phase.DRAINING)
        elif self.ledgers.num_kv_blocks <= chunk.blocks_after:
            self._send_layers(chunk)
        else:
            # Some rank mapped less than the others and decided what is published: those give it back.
            self._move(Phase.SHRINKING)
            self._unmap(chunk, ())

    def advance(self, now_s: float, wanted: bool) -> ChunkEnd | None:
        """Go as far as the replies allow, each phase once; never blocks.

        Args:
            now_s: monotonic clock.
            wanted: False = turn around: give everything back and end as cancelled.

        Returns:
            How the chunk ended, None while it is under way.

        Raises:
            CommandFailed: see there; the runner must not be used again.
        """
        chunk = self._chunk
        assert chunk is not None
        self._now_s = now_s
        if self.phase is Phase.DRAINING:
            self._drain(chunk, now_s, wanted)
        if self.phase is Phase.SHRINKING and not self.desk.copies and self._answered(chunk) is not None:
            self.ledgers.book_kv(chunk.blocks_after)
            if wanted:
                self._send_layers(chunk)
            else:
                chunk.end = ChunkEnd("cancelled")
                self._send_regrow(chunk)
        if self.phase is Phase.PREPARING:
            if self._votes:
                self._await_prepare(chunk, wanted)
            else:
                self._await_apply(chunk)
        if self.phase is Phase.COMMITTING and (replies := self._answered(chunk)) is not None:
            self._settle(chunk, replies)
        if self.phase is Phase.ABORTING and self._answered(chunk) is not None:
            self._undo(chunk)
        if self.phase is Phase.REGROWING and (replies := self._answered(chunk)) is not None:
            self._grow(chunk.blocks_before, replies)
            self._move(Phase.IDLE)
        if self.phase is not Phase.IDLE:
            return None
        self._chunk = None
        return chunk.end

    def wind_down(self) -> None:
        """After an error in here: unfence and unstage, as far as the world still answers."""
        chunk = self._chunk
        if self.phase is Phase.DRAINING:
            self.pool.cancel_shrink()
        if self._votes and self.phase is Phase.PREPARING and chunk is not None and chunk.plan is not None:
            if chunk.ticket is not None:
                self.desk.late.append(chunk.ticket)
            chunk.ticket = self.executor.abort(chunk.plan)

    def drain_replies(self) -> None:
        """After an error: take replies off the ring without looking at them."""
        chunk = self._chunk
        if chunk is not None and chunk.ticket is not None and chunk.ticket.poll() is not None:
            chunk.ticket = None
        self.desk.copies = [ticket for ticket in self.desk.copies if ticket.poll() is None]
        self.desk.drop_late()

    # ---- phases

    def _drain(self, chunk: _Chunk, now_s: float, wanted: bool) -> None:
        """Move live tail blocks below the fence; unmap when the tail is free."""
        stuck_s = now_s - chunk.progress_s
        if not wanted or stuck_s > self.config.kv.drain_timeout_s:
            self.pool.cancel_shrink()
            self._move(Phase.IDLE)
            chunk.end = ChunkEnd("cancelled")
            if wanted:
                tail = f"{chunk.num_live_tail} live blocks above {chunk.blocks_after}"
                error = f"{tail} found no room in {stuck_s:.1f} s"
                chunk.end = ChunkEnd("aborted", error=error, place="")
            return
        if self.desk.is_full:
            return
        step = self.pool.advance_shrink(self.config.kv.migrate_blocks_per_step)
        if step.copies or step.num_live_tail != chunk.num_live_tail:
            chunk.progress_s = now_s
            chunk.num_live_tail = step.num_live_tail
        if step.num_live_tail == 0:
            self.pool.finish_shrink()
            self._move(Phase.SHRINKING)
            self._unmap(chunk, step.copies)
        elif step.copies:
            plan = Plan(chunk.revision, (), chunk.blocks_before, step.copies)
            self.desk.copies.append(self.executor.commit(plan))
            chunk.revision = self.next_revision()
        elif now_s - chunk.progress_s > self.config.kv.drain_timeout_s / 2:
            self._preempt(chunk, now_s)

    def _preempt(self, chunk: _Chunk, now_s: float) -> None:
        """The last resort of a shrink: draining got nowhere for half of its time."""
        if self._preempted < self.config.kv.max_preemptions and self.pool.preempt_one():
            self._preempted += 1
            self.forced_preemptions += 1
            chunk.progress_s = now_s

    def _unmap(self, chunk: _Chunk, copies: tuple[tuple[int, int], ...]) -> None:
        """Send the last copies and the unmapping; a single rank gets the layers in the same command."""
        if self._votes:
            self._sent(chunk, self.executor.commit(Plan(chunk.revision, (), chunk.blocks_after, copies)))
            chunk.revision = self.next_revision()
        else:
            # It unmaps before it builds, so the bytes are there when it does.
            self.ledgers.book_kv(chunk.blocks_after)
            self._send_layers(chunk, copies)

    @property
    def _votes(self) -> bool:
        """More than one rank: none may switch before all can."""
        return self.executor.num_ranks > 1

    def _send_layers(self, chunk: _Chunk, copies: tuple[tuple[int, int], ...] = ()) -> None:
        self.ledgers.reserve_staging(chunk.new_bytes)
        chunk.plan = Plan(chunk.revision, chunk.layers, chunk.blocks_after, copies)
        if self._votes:
            self._sent(chunk, self.executor.prepare(chunk.plan))
        else:
            chunk.exposure_before = self.upper
            self.upper = max(self.upper, chunk.toward)  # from the next forward pass on
            self._sent(chunk, self.executor.apply(chunk.plan))
        self._move(Phase.PREPARING)

    def _await_apply(self, chunk: _Chunk) -> None:
        """One rank: its answer to `apply` says that it has switched, or that no layer has changed."""
        before = {rank: figures.weight_bytes for rank, figures in self.desk.ranks.items()}
        replies = self._replies(chunk)
        if replies is None:
            return
        if failed := failures(replies):
            # Against the rank's own last word: what the ledger counts may be a bound.
            switched = any(r.weight_bytes != before.get(r.rank, self.ledgers[0]["weights"]) for r in replies)
            if switched or not all(reply.kv_moved for reply in replies):
                raise CommandFailed(f"apply stopped half-way: {failed}")
            self.upper = chunk.exposure_before
            chunk.end = ChunkEnd("aborted", error=failed)
            self._move(Phase.ABORTING)
            self._undo(chunk)
            return
        self._move(Phase.COMMITTING)
        self._settle(chunk, replies)

    def _undo(self, chunk: _Chunk) -> None:
        """The layers stay what they were; give back the KV that was to pay for them."""
        self.ledgers.release_staging(chunk.new_bytes)
        if self.pool.num_kv_blocks < chunk.blocks_before:
            self._send_regrow(chunk)
        else:
            self._move(Phase.IDLE)

    def _await_prepare(self, chunk: _Chunk, wanted: bool) -> None:
        """Count the votes; one that is against, or later than the time-out, decides for all ranks."""
        assert chunk.plan is not None and chunk.ticket is not None
        timeout_s = self.config.transition.rank_timeout_s
        replies = self.desk.poll(chunk.ticket)
        if replies is None:
            if not self._is_overdue(chunk):
                return
            self.desk.late.append(chunk.ticket)
            silence_s = self._now_s - chunk.sent_s
            error = f"a rank has not prepared in {silence_s:.1f} s, transition.rank_timeout_s is {timeout_s:g}"
            self._abort(chunk, ChunkEnd("aborted", error=error, place="rank_timeout"))
            return
        chunk.worker_s = slowest(replies)
        late = [reply for reply in replies if reply.elapsed_s > timeout_s]
        if failed := failures(replies):
            self._abort(chunk, ChunkEnd("aborted", error=failed))
        elif late:
            self._picker.learn(chunk.direction, chunk.layers, chunk.worker_s)  # the next attempt takes fewer layers
            took = ", ".join(f"rank {reply.rank} took {reply.elapsed_s:.1f} s" for reply in late)
            error = f"{took} to prepare, transition.rank_timeout_s is {timeout_s:g}"
            self._abort(chunk, ChunkEnd("aborted", error=error, place="rank_timeout"))
        elif not wanted:
            self._abort(chunk, ChunkEnd("cancelled"))
        else:
            self.upper = max(self.upper, chunk.toward)  # from the next forward pass on
            self._sent(chunk, self.executor.commit(chunk.plan))
            self._move(Phase.COMMITTING)

    def _abort(self, chunk: _Chunk, end: ChunkEnd) -> None:
        """Have every rank forget what it has staged, or is still about to: commands keep their order."""
        assert chunk.plan is not None
        chunk.end = end
        self._sent(chunk, self.executor.abort(chunk.plan))
        self._move(Phase.ABORTING)

    def _settle(self, chunk: _Chunk, replies: tuple[Reply, ...]) -> None:
        """All ranks have switched: make that the truth here too."""
        self.ledgers.switch(chunk.new_bytes, chunk.old_bytes)
        for layer, fmt in chunk.layers:
            self.formats[layer] = fmt
        deeper = max(chunk.toward, self.upper)
        if tuple(self.formats) == self.ladder[chunk.toward].layer_formats:
            self.lower = self.upper = chunk.toward
        else:
            self.lower, self.upper = deeper - 1, deeper
        if chunk.blocks_after > self.pool.num_kv_blocks:
            self.ledgers.book_kv(chunk.blocks_after)
            self._grow(chunk.blocks_after, replies)
        self._picker.learn(chunk.direction, chunk.layers, chunk.worker_s + slowest(replies))
        chunk.end = ChunkEnd("committed", num_layers=len(chunk.layers), format=chunk.layers[-1][1])
        self._move(Phase.IDLE)

    # ---- parts

    def _move(self, phase: Phase) -> None:
        revision = 0 if self._chunk is None else self._chunk.revision
        logger.debug("morph r%d: %s -> %s", revision, self.phase.name, phase.name)
        self.phase = check_move(revision, self.phase, phase)

    def _send_regrow(self, chunk: _Chunk) -> None:
        """Map again what was unmapped for a switch that does not happen."""
        self.ledgers.book_kv(chunk.blocks_before)
        self._sent(chunk, self.executor.commit(Plan(self.next_revision(), (), chunk.blocks_before)))
        self._move(Phase.REGROWING)

    def _grow(self, num_kv_blocks: int, replies: tuple[Reply, ...]) -> None:
        """Publish what every rank has mapped, which may be less than it was asked for."""
        mapped = min(reply.num_kv_blocks for reply in replies)
        published = self.pool.num_kv_blocks
        if mapped < published:
            raise CommandFailed(f"a rank has {mapped} KV blocks mapped, but {published} are published.")
        if mapped < num_kv_blocks:
            self.short_grows += 1
            logger.warning("morph: ranks mapped %d KV blocks of the %d asked for", mapped, num_kv_blocks)
        self.pool.grow(min(mapped, num_kv_blocks))

    def _answered(self, chunk: _Chunk) -> tuple[Reply, ...] | None:
        """All ranks' replies to a command that cannot fail, None while one is missing."""
        replies = self._replies(chunk)
        if replies is not None:
            require_success(replies, self.phase.name.lower())
        return replies

    def _replies(self, chunk: _Chunk) -> tuple[Reply, ...] | None:
        """To a command that cannot be taken back: all one can do about a late rank is to wait, and to say so."""
        if chunk.ticket is None:
            return None
        replies = self.desk.poll(chunk.ticket)
        if replies is not None:
            chunk.ticket = None
        elif self._is_overdue(chunk) and not chunk.said_late:
            chunk.said_late = True
            logger.warning(
                "morph r%d: no answer of all ranks in %s for %.1f s; the engine goes on with %d KV blocks and waits",
                chunk.revision,
                self.phase.name,
                self._now_s - chunk.sent_s,
                self.pool.num_kv_blocks,
            )
        return replies

    def _sent(self, chunk: _Chunk, ticket: Ticket) -> None:
        chunk.ticket, chunk.sent_s, chunk.said_late = ticket, self._now_s, False

    def _is_overdue(self, chunk: _Chunk) -> bool:
        return self._now_s - chunk.sent_s > self.config.transition.rank_timeout_s
