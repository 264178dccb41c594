"""Carries out one swap batch at a time, phase by phase."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from morphserve.backoff import BackOff
from morphserve.config import MorphServeConfig
from morphserve.control.budget import Ledgers, RankBytes
from morphserve.control.doubt import Doubt, kv_was_unknown
from morphserve.control.layer_state import LayerPicker, LayerState
from morphserve.control.ranks import (
    BlockPoolPort,
    CommandFailed,
    ExecutorPort,
    Plan,
    RanksUnknown,
    Reply,
    ReplyTracker,
    Ticket,
    failures,
    slowest,
)
from morphserve.control.transition import BatchEnd, Drain, Phase, Preemptions, SwapBatch, check_move
from morphserve.errors import ConfigError
from policies import Ladder

logger = logging.getLogger(__name__)

_FIRST_REGROW_S = 1.0  # where failures may be tried again at once


@dataclass(slots=True)
class SwapRunner:
    """The path of all ranks from where they are to a neighbouring level, a swap batch at a time.

    Promises:
        1. `pool.grow` is called with no more blocks than every rank has answered to have mapped.
        2. A rank is told to unmap only blocks that `pool.finish_shrink` has forgotten, and only once all ranks have
           copied what lived there, but for what the same command copies.
        3. The ledgers hold every byte before a rank is asked to make it resident.
        4. Copies leave for the ranks within the call that renamed the blocks.
        5. No rank is told to switch before all have prepared, within `transition.rank_timeout_s`.
        6. KV that a rank may have moved by half is read by nobody: what runs is computed again. Where that is not
           enough, because weights or mapped blocks are in doubt too, it says so, with `RanksUnknown`.
    """

    ladder: Ladder
    ranks: Sequence[RankBytes]
    pool: BlockPoolPort
    executor: ExecutorPort
    ledgers: Ledgers
    config: MorphServeConfig
    phase: Phase = Phase.IDLE
    revision: int = 0
    short_grows: int = 0
    _is_short: bool = False  # of memory, when ranks were last asked for KV blocks
    preemptions: Preemptions = field(default_factory=Preemptions)
    replies: ReplyTracker = field(default_factory=ReplyTracker)
    layer_state: LayerState = field(init=False)
    _picker: LayerPicker = field(init=False)
    _doubt: Doubt = field(init=False)
    _regrow: BackOff = field(init=False)
    _batch: SwapBatch | None = None
    _now_s: float = 0.0

    def __post_init__(self) -> None:
        self.layer_state = LayerState(self.ladder, self.ranks)
        base = self.ladder[0]
        if self.pool.num_kv_blocks != base.num_kv_blocks:
            raise ConfigError(
                f"the block pool starts with {self.pool.num_kv_blocks} blocks, level 0 has "
                f"{base.num_kv_blocks}. Set kv.base_num_blocks to what the pool has."
            )
        self._picker = LayerPicker(self.ranks, self.ledgers, self.config.transition)
        self._doubt = Doubt(self.pool, self.ledgers, self.replies)
        transition = self.config.transition
        self._regrow = BackOff(max(transition.backoff_s, _FIRST_REGROW_S), transition.backoff_max_s)

    def next_revision(self) -> int:
        """Return a number that every rank has yet to see."""
        self.revision += 1
        return self.revision

    # ---- the swap batch

    def start(self, now_s: float, target: int) -> None:
        """Open a swap batch on the way to `target`, a level as `next_target` names it. Follow with `advance`."""
        self._now_s = now_s
        state = self.layer_state
        direction = state.direction(target)
        if direction == "degrade":
            self.preemptions.on_way_back = 0
        layers = self._picker.pick(
            state.formats, self.ladder[target].layer_formats, direction, self.executor.in_background
        )
        batch = SwapBatch(
            target=target,
            direction=direction,
            layers=layers,
            new_bytes=state.new_bytes(layers),
            old_bytes=state.old_bytes(layers),
            blocks_before=self.pool.num_kv_blocks,
            blocks_after=state.blocks_with(layers, target),
            revision=self.next_revision(),
        )
        self._batch = batch
        if batch.blocks_after < batch.blocks_before:
            batch.drain = Drain(self.pool, self.config.kv, self.preemptions, batch.blocks_after, now_s)
            self._move(Phase.DRAINING)
        elif self.ledgers.num_kv_blocks <= batch.blocks_after:
            self._send_layers(batch)
        else:
            # Some rank mapped less than the others and decided what is published: those give it back.
            self._move(Phase.SHRINKING)
            self._unmap(batch, ())

    def advance(self, now_s: float, wanted: bool) -> BatchEnd | None:
        """Go as far as the replies allow, each phase once; never blocks.

        Args:
            now_s: monotonic clock.
            wanted: False = turn around: give everything back and end as cancelled.

        Returns:
            How the swap batch ended, None while it is under way.

        Raises:
            CommandFailed, RanksUnknown: see there; the runner must not be used again.
        """
        batch = self._batch
        assert batch is not None
        self._now_s = now_s
        if failed := self.take_copies():
            batch.end = kv_was_unknown(failed)
        if self.phase is Phase.DRAINING:
            self._drain(batch, wanted)
        if self.phase is Phase.SHRINKING:
            self._await_unmap(batch, wanted)
        if self.phase is Phase.PREPARING:
            self._await_prepare(batch, wanted)
        if self.phase is Phase.COMMITTING:
            self._await_commit(batch)
        if self.phase is Phase.ABORTING and self._answered(batch) is not None:
            self._undo(batch)
        if self.phase is Phase.REGROWING and (replies := self._answered(batch)) is not None:
            self._grow(batch.blocks_before, replies, again=not batch.layers)
            self._move(Phase.IDLE)
        if self.phase is not Phase.IDLE:
            return None
        self._batch = None
        return batch.end

    @property
    def is_moving_blocks(self) -> bool:
        """Whether blocks may have new names that no rank has heard of, if an error has come in between."""
        return self.phase in (Phase.DRAINING, Phase.SHRINKING)

    @property
    def has_failed(self) -> bool:
        """Whether a rank has said no to a command that cannot fail, and nobody has taken that answer yet."""
        return self.replies.has_failed_copies or (self.phase is not Phase.PREPARING and self.replies.has_failed)

    def take_copies(self) -> str:
        """Take the answers to copies that have come. If a rank has failed, let all be computed again and say why.

        Raises:
            RanksUnknown: more than the KV is in doubt.
        """
        replies = self.replies.poll_copies()
        return self._doubt.discard_kv(replies) if replies else ""

    def check_unanswered(self) -> None:
        """Look at what ranks answer to what was sent before an error in here, and take it.

        Raises:
            RanksUnknown: some have done it and some have not.
        """
        self.take_copies()
        if (replies := self.replies.answer()) is not None and (failed := failures(replies)):
            if self.phase is Phase.SHRINKING:
                self._doubt.discard_kv(replies)
            elif self.phase is Phase.COMMITTING or not self._doubt.is_sound(replies):
                raise RanksUnknown(failed)
        self.replies.drop_late()

    def grow_again(self, now_s: float, may_start: bool) -> bool:
        """Ask now and then, at rest, for blocks that a rank had no memory for. Return whether none is asked now."""
        level, wanted = self.layer_state.current, self.ladder[self.layer_state.current].num_kv_blocks
        if self.phase is Phase.IDLE:
            if self.layer_state.is_between or self.pool.num_kv_blocks >= wanted:
                self._regrow.reset()
            elif may_start and not self.replies.copies and self._regrow.is_due(now_s):
                self._now_s, end = now_s, BatchEnd("committed")
                self._batch = SwapBatch(level, "degrade", (), (), (), wanted, wanted, self.revision, end=end)
                self._send_regrow(self._batch)
        return self.phase is Phase.IDLE or self.advance(now_s, wanted=True) is not None

    def wind_down(self) -> None:
        """Unfence and unstage after an error in here, as far as the world still answers."""
        batch = self._batch
        if self.phase is Phase.DRAINING:
            self.pool.cancel_shrink()
        if self.is_moving_blocks:
            self.pool.discard_contents()
        if self._votes and self.phase is Phase.PREPARING and batch is not None and batch.plan is not None:
            self.replies.give_up()
            self.replies.expect(self.executor.abort(batch.plan), self._now_s)

    # ---- phases

    def _drain(self, batch: SwapBatch, wanted: bool) -> None:
        """Move live tail blocks below the fence; unmap when the tail is free."""
        assert batch.drain is not None
        if batch.end is not None:  # the KV was unknown, and is gone
            self.pool.cancel_shrink()
            self._move(Phase.IDLE)
            return
        error = batch.drain.timed_out(self._now_s)
        if error or not wanted:
            self.pool.cancel_shrink()
            self._move(Phase.IDLE)
            full = BatchEnd("aborted", error=error, place="", num_kv_blocks=batch.blocks_after)
            batch.end = full if wanted else BatchEnd("cancelled")
            return
        if self.replies.is_full:
            return
        step = batch.drain.advance(self._now_s)
        # Unmapped under a rank that has not copied, a step under way would read blocks that are gone.
        if step.num_live_tail == 0 and not self.replies.copies:
            self.pool.finish_shrink()
            self._move(Phase.SHRINKING)
            self._unmap(batch, step.copies)
        elif step.copies:
            plan = Plan(batch.revision, (), batch.blocks_before, step.copies)
            self.replies.expect_copies(self.executor.commit(plan))
            batch.revision = self.next_revision()

    def _unmap(self, batch: SwapBatch, copies: tuple[tuple[int, int], ...]) -> None:
        """Send the last copies and the unmapping; a single rank gets the layers in the same command."""
        if self._votes:
            self._sent(self.executor.commit(Plan(batch.revision, (), batch.blocks_after, copies)))
            batch.revision = self.next_revision()
        else:
            # It unmaps before it builds, so the bytes are there when it does.
            self.ledgers.book_kv(batch.blocks_after)
            self._send_layers(batch, copies)

    def _await_unmap(self, batch: SwapBatch, wanted: bool) -> None:
        """Take the news that all ranks have copied and unmapped; a rank that could not has changed no layer."""
        replies = self._replies(batch)
        if replies is None:
            return
        if failures(replies):
            batch.end = self._doubt.end_of(replies)
        else:
            self.ledgers.book_kv(batch.blocks_after)
        if wanted and batch.end is None:
            self._send_layers(batch)
        else:
            batch.end = batch.end or BatchEnd("cancelled")
            self._send_regrow(batch)

    @property
    def _votes(self) -> bool:
        """Whether ranks are asked before they switch: one of several, or one that prepares beside its steps."""
        return self.executor.num_ranks > 1 or self.executor.in_background

    def _send_layers(self, batch: SwapBatch, copies: tuple[tuple[int, int], ...] = ()) -> None:
        self.ledgers.reserve_staging(batch.new_bytes)
        batch.plan = Plan(batch.revision, batch.layers, batch.blocks_after, copies, alone=not self._votes)
        if self._votes:
            self._sent(self.executor.prepare(batch.plan))
            self._move(Phase.PREPARING)
        else:
            self._send_commit(batch, batch.plan)

    def _send_commit(self, batch: SwapBatch, plan: Plan) -> None:
        batch.was_between = self.layer_state.is_between
        self.layer_state.begin_switch(batch.target)
        self._sent(self.executor.commit(plan))
        self._move(Phase.COMMITTING)

    def _await_commit(self, batch: SwapBatch) -> None:
        """Take the news that all ranks have switched; or that the one that prepared within the commit could not."""
        assert batch.plan is not None
        replies = self._replies(batch)
        if replies is None:
            return
        if failed := failures(replies):
            if not batch.plan.alone:
                raise RanksUnknown(failed)
            batch.end = self._doubt.end_of(replies)
            self.layer_state.is_between = batch.was_between
            self._undo(batch)
            return
        self._settle(batch, replies)

    def _undo(self, batch: SwapBatch) -> None:
        """Give back the KV that was to pay for layers that stay what they were."""
        self.ledgers.release_staging(batch.new_bytes)
        if self.pool.num_kv_blocks < batch.blocks_before:
            self._send_regrow(batch)
        else:
            self._move(Phase.IDLE)

    def _await_prepare(self, batch: SwapBatch, wanted: bool) -> None:
        """Count the votes; one that is against, or later than the time-out, decides for all ranks."""
        assert batch.plan is not None
        timeout_s = self.config.transition.rank_timeout_s
        replies = self.replies.answer()
        if replies is None:
            silence_s = self.replies.silence_s(self._now_s)
            if silence_s <= timeout_s:
                return
            self.replies.give_up()
            error = f"a rank has not prepared in {silence_s:.1f} s, transition.rank_timeout_s is {timeout_s:g}"
            self._abort(batch, BatchEnd("aborted", error=error, place="rank_timeout"))
            return
        batch.worker_s = slowest(replies)
        late = [reply for reply in replies if reply.elapsed_s > timeout_s]
        if failed := failures(replies):
            self._abort(batch, BatchEnd("aborted", error=failed))
        elif late:
            self._picker.learn(batch.direction, batch.layers, batch.worker_s)  # the next attempt takes fewer layers
            took = ", ".join(f"rank {reply.rank} took {reply.elapsed_s:.1f} s" for reply in late)
            error = f"{took} to prepare, transition.rank_timeout_s is {timeout_s:g}"
            self._abort(batch, BatchEnd("aborted", error=error, place="rank_timeout"))
        elif not wanted:
            self._abort(batch, BatchEnd("cancelled"))
        else:
            self._send_commit(batch, batch.plan)

    def _abort(self, batch: SwapBatch, end: BatchEnd) -> None:
        """Have every rank forget what it has staged, or is still about to: commands keep their order."""
        assert batch.plan is not None
        batch.end = end
        self._sent(self.executor.abort(batch.plan))
        self._move(Phase.ABORTING)

    def _settle(self, batch: SwapBatch, replies: tuple[Reply, ...]) -> None:
        """Book that all ranks have switched."""
        self.ledgers.switch(batch.new_bytes, batch.old_bytes)
        self.layer_state.settle(batch.layers, batch.target)
        if batch.blocks_after > self.pool.num_kv_blocks:
            self.ledgers.book_kv(batch.blocks_after)
            self._grow(batch.blocks_after, replies)
        self._picker.learn(batch.direction, batch.layers, batch.worker_s + slowest(replies))
        batch.end = BatchEnd("committed", num_layers=len(batch.layers), format=batch.layers[-1][1])
        self._move(Phase.IDLE)

    # ---- parts

    def _move(self, phase: Phase) -> None:
        revision = 0 if self._batch is None else self._batch.revision
        logger.debug("morph r%d: %s -> %s", revision, self.phase.name, phase.name)
        self.phase = check_move(revision, self.phase, phase)

    def _send_regrow(self, batch: SwapBatch) -> None:
        """Map again what was unmapped for a switch that does not happen."""
        self.ledgers.book_kv(batch.blocks_before)
        self._sent(self.executor.commit(Plan(self.next_revision(), (), batch.blocks_before)))
        self._move(Phase.REGROWING)

    def _grow(self, num_kv_blocks: int, replies: tuple[Reply, ...], again: bool = False) -> None:
        """Publish what every rank has mapped, which may be less than it was asked for; said once."""
        mapped, published = min(reply.num_kv_blocks for reply in replies), self.pool.num_kv_blocks
        if mapped < published:
            raise RanksUnknown(f"a rank has {mapped} KV blocks mapped, but {published} are published")
        was_short, self._is_short = self._is_short, mapped < num_kv_blocks
        self.short_grows += self._is_short and not again
        if self._is_short and not (again or was_short):  # one warning, however many swap batches get no more
            text = "morph: ranks mapped %d KV blocks of the %d asked for, and are asked again now and then: %s"
            logger.warning(text, mapped, num_kv_blocks, "; ".join(sorted({reply.error for reply in replies} - {""})))
        self.pool.grow(min(mapped, num_kv_blocks))

    def _answered(self, batch: SwapBatch) -> tuple[Reply, ...] | None:
        """Return all ranks' replies to a command that cannot fail, None while one is missing."""
        replies = self._replies(batch)
        if replies is not None and (failed := failures(replies)):
            if self._doubt.is_sound(replies):
                raise CommandFailed(f"{self.phase.name} cannot fail, but did: {failed}. What serves is as it was.")
            raise RanksUnknown(failed)
        return replies

    def _replies(self, batch: SwapBatch) -> tuple[Reply, ...] | None:
        """Return the replies to a command that cannot be taken back, or warn that a rank is late: one can only wait."""
        replies = self.replies.answer()
        if replies is None and self.replies.becomes_late(self._now_s, self.config.transition.rank_timeout_s):
            logger.warning(
                "morph r%d: no answer of all ranks in %s for %.1f s; the engine goes on with %d KV blocks and waits",
                batch.revision, self.phase.name, self.replies.silence_s(self._now_s), self.pool.num_kv_blocks,
            )  # fmt: skip
        return replies

    def _sent(self, ticket: Ticket) -> None:
        self.replies.expect(ticket, self._now_s)
