"""Ranks in miniature behind one queue of commands and forward passes; each takes them in order, at its own pace.

A rank's memory is the blocks it has mapped and, for each slot, the tokens it was computed from. Reading what is not
mapped, or was computed from other tokens, raises.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from seams.pool_model import BLOCK, Prefix

from morphserve.control import Ledgers, Plan
from morphserve.control.budget import RankBytes
from policies.types import Ladder
from tests.rank_rules import FakeTicket, RankRules, RankState

Reuse = Callable[[int, int, int], bool]  # (best, deepest level in a block, level of the request) -> may be reused


@dataclass(slots=True)
class Command:
    kind: str
    plan: Plan
    ticket: FakeTicket


@dataclass(slots=True)
class Work:
    """One request's part of a forward pass, as the scheduler sent it."""

    name: str
    starts: bool  # the table is replaced, else extended
    ids: list[int]
    first: int  # position; the ones before must be there
    prefixes: list[Prefix]  # of all tokens up to the last one computed now
    demands_full: bool = False


@dataclass(slots=True)
class Forward:
    level: int  # that its tokens count for
    published: int
    works: list[Work]
    ended: list[str]
    formats: list[str] | None = None  # of the first rank that ran it


@dataclass(slots=True)
class Rank(RankState):
    kv: dict[int, list[Prefix]] = field(default_factory=dict)  # mapped block -> tokens of its slots
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)  # block -> best and deepest level in it
    tables: dict[str, list[int]] = field(default_factory=dict)
    position: int = 0  # of the next item in the queue
    map_at_most: int | None = None
    fails: bool = False  # to prepare


class Ranks(RankRules[Rank]):
    def __init__(self, ladder: Ladder, sizes: Sequence[RankBytes], ledgers: Ledgers, may_reuse: Reuse) -> None:
        base = ladder[0]
        blocks = range(base.num_kv_blocks)
        ranks = [Rank(i, list(base.layer_formats), kv={block: [] for block in blocks}) for i in range(len(sizes))]
        super().__init__(ranks, sizes, ledgers)
        self.delay = 0
        self.published: Callable[[], int] = lambda: base.num_kv_blocks
        self._base_formats = list(base.layer_formats)
        self._may_reuse = may_reuse
        self._queue: deque[Command | Forward] = deque()
        self._first = 0  # position of the queue's head
        self._undrained: list[FakeTicket] = []

    # ---- what the controller and the scheduler send

    def forward(self, step: Forward, max_in_flight: int) -> None:
        """Queue a forward pass; ranks run until no more than `max_in_flight` are under way."""
        self._queue.append(step)
        for rank in self.ranks:
            while sum(type(item) is Forward for item in self._ahead(rank)) > max_in_flight:
                self.run(rank)

    def run(self, rank: Rank) -> bool:
        """The next item on one rank; False when it has done all."""
        at = rank.position - self._first
        if at == len(self._queue):
            return False
        item = self._queue[at]
        rank.position += 1
        if type(item) is Command:
            item.ticket.replies[rank.index] = self._obey(item.kind, item.plan, rank)
        else:
            self._run_forward(item, rank)
        while self._queue and all(r.position > self._first for r in self.ranks):
            self._queue.popleft()
            self._first += 1
        return True

    def check(self) -> None:
        """Rules 1 and 4, at any moment."""
        published = self.published()
        for rank in self.ranks:
            assert len(rank.kv) >= published, f"{published} blocks published, rank {rank.index} maps {len(rank.kv)}"

    # ---- a rank

    def _ahead(self, rank: Rank) -> list[Command | Forward]:
        return [self._queue[i] for i in range(rank.position - self._first, len(self._queue))]

    def _send(self, command: str, plan: Plan) -> FakeTicket:
        self._undrained = [t for t in self._undrained if not t.taken]
        ticket = FakeTicket(self.delay, self.num_ranks, earlier=self._undrained[:])
        self._undrained.append(ticket)
        assert len(self._undrained) <= 10, "the ring is full: the engine would dead-lock"
        self._queue.append(Command(command, plan, ticket))
        return ticket

    def _run_forward(self, step: Forward, rank: Rank) -> None:
        for name in step.ended:
            rank.tables.pop(name, None)
        assert len(rank.kv) >= step.published, f"rank {rank.index} maps less than this step may use"
        if step.formats is None:
            step.formats = list(rank.formats)
        assert step.formats == rank.formats, f"rank {rank.index} is at another level in the same step"
        if step.level == 0:
            assert rank.formats == self._base_formats, "tokens count for level 0, layers are quantized"
        for work in step.works:
            self._run_request(step, work, rank)

    def _run_request(self, step: Forward, work: Work, rank: Rank) -> None:
        if work.starts:
            rank.tables[work.name] = list(work.ids)
        else:
            rank.tables[work.name] += work.ids
        table, kv, prefixes = rank.tables[work.name], rank.kv, work.prefixes
        for block, start in zip(table, range(0, work.first, BLOCK), strict=False):
            assert block in kv, f"block {block} read, not mapped on rank {rank.index}"
            end = min(start + BLOCK, work.first)
            assert kv[block][: end - start] == prefixes[start:end], f"{work.name} reads another's KV in block {block}"
        span = (step.level, step.level)
        if work.first:
            for block in table[: -(-work.first // BLOCK)]:
                best, deepest = rank.spans[block]
                span = (min(best, span[0]), max(deepest, span[1]))
                if work.starts:
                    level = 0 if work.demands_full else step.level
                    assert self._may_reuse(best, deepest, level) and (deepest == 0 or not work.demands_full), (
                        f"{work.name} at level {level} reuses KV of levels {best} to {deepest}"
                    )
        for position in range(work.first, len(prefixes)):
            block, slot = table[position // BLOCK], position % BLOCK
            assert block in kv, f"block {block} written, not mapped on rank {rank.index}"
            kv[block][slot:] = [prefixes[position]]
            rank.spans[block] = span

    def _error(self, command: str, plan: Plan, rank: Rank) -> str:
        return "planned" if rank.fails and command in ("prepare", "alone") else ""

    def _mapped(self, rank: Rank) -> int:
        return len(rank.kv)

    def _copy(self, plan: Plan, rank: Rank) -> None:
        self.copy(rank, plan.copies)
        self.rewrite(rank, dict(plan.copies))

    def _unmap(self, num_kv_blocks: int, rank: Rank) -> None:
        assert num_kv_blocks >= self.published(), "unmaps what the scheduler can hand out"
        for block in range(num_kv_blocks, len(rank.kv)):
            del rank.kv[block]
            rank.spans.pop(block, None)

    def _map(self, num_kv_blocks: int, rank: Rank) -> None:
        top = num_kv_blocks if rank.map_at_most is None else min(num_kv_blocks, rank.map_at_most)
        for block in range(len(rank.kv), top):
            rank.kv[block] = []

    def copy(self, rank: Rank, copies: Sequence[tuple[int, int]]) -> None:
        """The KV of each source to its destination."""
        for source, destination in copies:
            assert source in rank.kv and destination in rank.kv, f"copy of unmapped KV on rank {rank.index}"
            rank.kv[destination] = list(rank.kv[source])
            rank.spans[destination] = rank.spans.get(source, (0, 0))

    def rewrite(self, rank: Rank, renamed: Mapping[int, int]) -> None:
        """Block tables that the rank keeps between steps."""
        for table in rank.tables.values():
            table[:] = [renamed.get(block, block) for block in table]
