"""Carries out one chunk at a time: a few layers, and the KV blocks they pay for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from morphserve.config import MorphServeConfig
from morphserve.controller.ledger import Ledger
from morphserve.controller.ports import BlockPoolPort, ExecutorPort, Plan, Reply, Ticket
from morphserve.controller.replies import CommandFailed, ReplyDesk, failures, require_success, slowest
from morphserve.controller.transition import Direction, Outcome, Phase, check_move
from morphserve.errors import ConfigError
from policies.types import Ladder

logger = logging.getLogger(__name__)

LayerBytes = Mapping[str, Sequence[int]]  # format -> bytes of each decoder layer on one rank
_COST_SHARE = 0.5  # weight of the newest measurement of seconds per layer
# Until a direction has been measured. Reading and rebuilding a layer ran at 0.6 to 1 GB/s on one core.
_FIRST_S_PER_BYTE = 1 / 0.6e9


@dataclass(frozen=True, slots=True)
class ChunkEnd:
    """How a chunk ended. `committed`: now nearer to `toward`. Else everything is as before it began."""

    outcome: Outcome
    num_layers: int = 0
    format: str = ""
    error: str = ""
    drain_timeout: bool = False


@dataclass(slots=True)
class _Chunk:
    toward: int  # the rung it approaches
    direction: Direction
    layers: tuple[tuple[int, str], ...]
    new_bytes: int  # staged
    old_bytes: int  # freed on commit
    blocks_before: int
    blocks_after: int
    revision: int
    plan: Plan | None = None
    ticket: Ticket | None = None
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
        3. The ledger holds every byte before a rank is asked to make it resident.
        4. Copies leave for the ranks within the call that renamed the blocks.

    Attributes:
        lower: deepest level whose formats all layers have at least.
        upper: the level to count tokens at: == lower on a rung, else the rung below.
    """

    ladder: Ladder
    layer_bytes: LayerBytes
    pool: BlockPoolPort
    executor: ExecutorPort
    ledger: Ledger
    config: MorphServeConfig
    phase: Phase = Phase.IDLE
    lower: int = 0
    upper: int = 0
    revision: int = 0
    short_grows: int = 0
    desk: ReplyDesk = field(default_factory=ReplyDesk)
    formats: list[str] = field(init=False)
    _weight_bytes: int = field(init=False)
    _chunk: _Chunk | None = None
    _seconds_per_layer: dict[Direction, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base = self.ladder[0]
        for level in self.ladder:
            found = sum(self.layer_bytes[fmt][i] for i, fmt in enumerate(level.layer_formats))
            if found != level.weight_bytes:
                raise ConfigError(
                    f"level {level.index} has weight_bytes {level.weight_bytes}, its layers sum to {found}. "
                    "Build the ladder from the same layer_bytes."
                )
        if self.pool.num_kv_blocks != base.num_kv_blocks:
            raise ConfigError(
                f"the block pool starts with {self.pool.num_kv_blocks} blocks, level 0 has "
                f"{base.num_kv_blocks}. Set kv.base_num_blocks to what the pool has."
            )
        self.formats = list(base.layer_formats)
        self._weight_bytes = base.weight_bytes

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
        direction: Direction = "degrade" if rung > self.lower else "restore"
        layers = self._pick_layers(rung, direction)
        new_bytes = sum(self.layer_bytes[fmt][layer] for layer, fmt in layers)
        old_bytes = sum(self.layer_bytes[self.formats[layer]][layer] for layer, _ in layers)
        deeper = max(rung, self.upper)
        freed = self.ladder[0].weight_bytes - (self._weight_bytes - old_bytes + new_bytes)
        paid = self.ladder[0].num_kv_blocks + freed // self.ledger.kv_block_bytes
        chunk = _Chunk(
            toward=rung,
            direction=direction,
            layers=layers,
            new_bytes=new_bytes,
            old_bytes=old_bytes,
            blocks_before=self.pool.num_kv_blocks,
            blocks_after=min(paid, self.ladder[deeper].num_kv_blocks),
            revision=self.next_revision(),
            progress_s=now_s,
        )
        self._chunk = chunk
        if chunk.blocks_after < chunk.blocks_before:
            self.pool.begin_shrink(chunk.blocks_after)
            self._move(Phase.DRAINING)
        elif self.ledger["kv_blocks"] <= chunk.blocks_after * self.ledger.kv_block_bytes:
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
        if self.phase is Phase.DRAINING:
            self._drain(chunk, now_s, wanted)
        if self.phase is Phase.SHRINKING and not self.desk.copies and self._answered(chunk) is not None:
            self._book_kv(chunk.blocks_after)
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
                self.desk.copies.append(chunk.ticket)
            chunk.ticket = self.executor.abort(chunk.plan)

    def drain_replies(self) -> None:
        """After an error: take replies off the ring without looking at them."""
        chunk = self._chunk
        if chunk is not None and chunk.ticket is not None and chunk.ticket.poll() is not None:
            chunk.ticket = None
        self.desk.copies = [ticket for ticket in self.desk.copies if ticket.poll() is None]

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
                chunk.end = ChunkEnd("aborted", error=error, drain_timeout=True)
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

    def _unmap(self, chunk: _Chunk, copies: tuple[tuple[int, int], ...]) -> None:
        """Send the last copies and the unmapping; a single rank gets the layers in the same command."""
        if self._votes:
            chunk.ticket = self.executor.commit(Plan(chunk.revision, (), chunk.blocks_after, copies))
            chunk.revision = self.next_revision()
        else:
            # It unmaps before it builds, so the bytes are there when it does.
            self._book_kv(chunk.blocks_after)
            self._send_layers(chunk, copies)

    @property
    def _votes(self) -> bool:
        """More than one rank: none may switch before all can."""
        return self.executor.num_ranks > 1

    def _send_layers(self, chunk: _Chunk, copies: tuple[tuple[int, int], ...] = ()) -> None:
        self.ledger.reserve("staging", chunk.new_bytes)
        chunk.plan = Plan(chunk.revision, chunk.layers, chunk.blocks_after, copies)
        if self._votes:
            chunk.ticket = self.executor.prepare(chunk.plan)
        else:
            chunk.exposure_before = self.upper
            self.upper = max(self.upper, chunk.toward)  # from the next forward pass on
            chunk.ticket = self.executor.apply(chunk.plan)
        self._move(Phase.PREPARING)

    def _await_apply(self, chunk: _Chunk) -> None:
        """One rank: its answer to `apply` says that it has switched, or that no layer has changed."""
        assert chunk.ticket is not None
        before = {rank: figures.weight_bytes for rank, figures in self.desk.ranks.items()}
        replies = self.desk.poll(chunk.ticket)
        if replies is None:
            return
        chunk.ticket = None
        if failed := failures(replies):
            # Against the rank's own last word: what the ladder counts may be a bound (`common_layer_bytes`).
            switched = any(r.weight_bytes != before.get(r.rank, self._weight_bytes) for r in replies)
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
        self.ledger.release("staging", chunk.new_bytes)
        if self.pool.num_kv_blocks < chunk.blocks_before:
            self._send_regrow(chunk)
        else:
            self._move(Phase.IDLE)

    def _await_prepare(self, chunk: _Chunk, wanted: bool) -> None:
        assert chunk.plan is not None and chunk.ticket is not None
        replies = self.desk.poll(chunk.ticket)
        if replies is None:
            return
        chunk.ticket = None
        chunk.worker_s = slowest(replies)
        failed = failures(replies)
        if not failed and wanted:
            self.upper = max(self.upper, chunk.toward)  # from the next forward pass on
            chunk.ticket = self.executor.commit(chunk.plan)
            self._move(Phase.COMMITTING)
            return
        chunk.end = ChunkEnd("aborted", error=failed) if failed else ChunkEnd("cancelled")
        chunk.ticket = self.executor.abort(chunk.plan)
        self._move(Phase.ABORTING)

    def _settle(self, chunk: _Chunk, replies: tuple[Reply, ...]) -> None:
        """All ranks have switched: make that the truth here too."""
        self.ledger.transfer("staging", "weights", chunk.new_bytes)
        self.ledger.release("weights", chunk.old_bytes)
        self._weight_bytes += chunk.new_bytes - chunk.old_bytes
        for layer, fmt in chunk.layers:
            self.formats[layer] = fmt
        deeper = max(chunk.toward, self.upper)
        if tuple(self.formats) == self.ladder[chunk.toward].layer_formats:
            self.lower = self.upper = chunk.toward
        else:
            self.lower, self.upper = deeper - 1, deeper
        if chunk.blocks_after > self.pool.num_kv_blocks:
            self._book_kv(chunk.blocks_after)
            self._grow(chunk.blocks_after, replies)
        cost = (chunk.worker_s + slowest(replies)) / len(chunk.layers)
        known = self._seconds_per_layer.get(chunk.direction, cost)
        self._seconds_per_layer[chunk.direction] = known + _COST_SHARE * (cost - known)
        chunk.end = ChunkEnd("committed", num_layers=len(chunk.layers), format=chunk.layers[-1][1])
        self._move(Phase.IDLE)

    # ---- parts

    def _move(self, phase: Phase) -> None:
        revision = 0 if self._chunk is None else self._chunk.revision
        logger.debug("morph r%d: %s -> %s", revision, self.phase.name, phase.name)
        self.phase = check_move(revision, self.phase, phase)

    def _pick_layers(self, rung: int, direction: Direction) -> tuple[tuple[int, str], ...]:
        """Layers to switch next: as many as the pause and the staging reserve allow, at least one.

        What a layer takes beyond the budget of the level it leaves is the smaller of its two sizes: going
        down the new one is staged beside the old; going up, the KV given back has paid the difference.
        """
        wanted = [
            (layer, fmt) for layer, fmt in enumerate(self.ladder[rung].layer_formats) if fmt != self.formats[layer]
        ]
        largest = max((self.layer_bytes[fmt][layer] for layer, fmt in wanted), default=0)
        limit = self.config.transition.max_layers_per_step
        cost = self._seconds_per_layer.get(direction, largest * _FIRST_S_PER_BYTE)
        if cost > 0:
            limit = max(1, min(limit, int(self.config.transition.max_pause_ms / 1000 / cost)))
        layers: list[tuple[int, str]] = []
        excess = 0
        for layer, fmt in wanted:
            excess += min(self.layer_bytes[fmt][layer], self.layer_bytes[self.formats[layer]][layer])
            if layers and (len(layers) == limit or excess > self.ledger.staging_reserve_bytes):
                break
            layers.append((layer, fmt))
        return tuple(layers)

    def _send_regrow(self, chunk: _Chunk) -> None:
        """Map again what was unmapped for a switch that does not happen."""
        self._book_kv(chunk.blocks_before)
        chunk.ticket = self.executor.commit(Plan(self.next_revision(), (), chunk.blocks_before))
        self._move(Phase.REGROWING)

    def _book_kv(self, num_kv_blocks: int) -> None:
        """Make the ledger's KV account what ranks hold, or are about to be told to hold."""
        change = num_kv_blocks * self.ledger.kv_block_bytes - self.ledger["kv_blocks"]
        if change >= 0:
            self.ledger.reserve("kv_blocks", change)
        else:
            self.ledger.release("kv_blocks", -change)

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
        if chunk.ticket is None:
            return None
        replies = self.desk.poll(chunk.ticket)
        if replies is not None:
            chunk.ticket = None
            require_success(replies, self.phase.name.lower())
        return replies
