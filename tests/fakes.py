"""A block pool and ranks in miniature: they implement the controller's ports and check its promises.

One step of a test is what one step of an engine is: `controller.tick`, then requests take and free
blocks, then `executor.forward(pool)`, which carries out the commands sent before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from morphserve.config import LadderConfig, LadderStep, MorphServeConfig, TransitionConfig
from morphserve.control import (
    Controller,
    DecisionLog,
    EngineView,
    Ledgers,
    Phase,
    Plan,
    ShrinkProgress,
    largest_batch_bytes,
    make_ledgers,
)
from morphserve.control.budget import RankBytes
from morphserve.control.ladder import build_ladder
from morphserve.control.monitor import Monitor
from policies import BASE_FORMAT, Decision, Ladder, Policy, Signals
from tests.rank_rules import FakeTicket, RankRules, RankState

Fail = Callable[[str, Plan, int], str]  # (command, plan, rank) -> error, '' = none


class FakePool:
    """Blocks 1 to N-1, free or held by a request. Every live block carries a tag: its content."""

    def __init__(self, num_kv_blocks: int) -> None:
        self.num_kv_blocks = num_kv_blocks
        self.free = set(range(1, num_kv_blocks))
        self.held: dict[int, list[int]] = {}  # request -> its blocks
        self.tags: dict[int, int] = {}  # live block -> content
        self.unwritten: set[int] = set()  # allocated since the last forward pass
        self.fence: int | None = None
        self.fenced_free: set[int] = set()
        self.preempted: list[int] = []
        self.num_discards = 0
        self._next_tag = 0

    @property
    def num_used_blocks(self) -> int:
        return len(self.tags)

    def allocate(self, request: int, count: int) -> bool:
        """Highest ids first, so that shrinking finds live tail blocks."""
        if len(self.free) < count:
            return False
        for block in sorted(self.free, reverse=True)[:count]:
            self.free.remove(block)
            self.held.setdefault(request, []).append(block)
            self._next_tag += 1
            self.tags[block] = self._next_tag
            self.unwritten.add(block)
        return True

    def finish(self, request: int) -> None:
        for block in self.held.pop(request):
            del self.tags[block]
            self.unwritten.discard(block)
            self.free.add(block)

    def grow(self, num_kv_blocks: int) -> None:
        assert self.fence is None, "grow during a shrink"
        assert num_kv_blocks >= self.num_kv_blocks, "grow to fewer blocks"
        self.free.update(range(self.num_kv_blocks, num_kv_blocks))
        self.num_kv_blocks = num_kv_blocks

    def begin_shrink(self, num_kv_blocks: int) -> None:
        assert self.fence is None, "two shrinks at once"
        assert 1 < num_kv_blocks < self.num_kv_blocks
        self.fence = num_kv_blocks
        self._collect()

    def advance_shrink(self, max_copies: int) -> ShrinkProgress:
        assert self.fence is not None, "advance without begin"
        self._collect()
        copies = []
        for blocks in self.held.values():
            for index, source in enumerate(blocks):
                if source >= self.fence and self.free and len(copies) < max_copies:
                    destination = min(self.free)
                    self.free.remove(destination)
                    self.fenced_free.add(source)
                    blocks[index] = destination
                    self.tags[destination] = self.tags.pop(source)
                    copies.append((source, destination))
        return ShrinkProgress(tuple(copies), sum(block >= self.fence for block in self.tags))

    def discard_contents(self) -> None:
        self.num_discards += 1
        for request in list(self.held):
            self.preempted.append(request)
            self.finish(request)

    def preempt_one(self) -> bool:
        if len(self.held) < 2:
            return False
        self.preempted.append(min(self.held, key=lambda request: len(self.held[request])))
        self.finish(self.preempted[-1])
        return True

    def finish_shrink(self) -> None:
        assert self.fence is not None, "finish without begin"
        assert all(block < self.fence for block in self.tags), "finish with live tail blocks"
        self.num_kv_blocks, self.fence = self.fence, None
        self.fenced_free.clear()

    def cancel_shrink(self) -> None:
        assert self.fence is not None, "cancel without begin"
        self.fence = None
        self.free |= self.fenced_free
        self.fenced_free.clear()

    def check_whole(self) -> None:
        """No block is lost, doubled, or outside of what is published."""
        assert not self.free & self.tags.keys() and not self.free & self.fenced_free
        everything = self.free | self.tags.keys() | self.fenced_free
        assert everything == set(range(1, self.num_kv_blocks)), "a block was lost or invented"

    def _collect(self) -> None:
        assert self.fence is not None
        tail = {block for block in self.free if block >= self.fence}
        self.free -= tail
        self.fenced_free |= tail


@dataclass(slots=True)
class FakeRank(RankState):
    """One worker: its layers, its mapped blocks, and what they contain."""

    mapped: int = 0
    contents: dict[int, int] = field(default_factory=dict)


class FakeExecutor(RankRules[FakeRank]):
    """Ranks that obey in order, and assert what the ports promise them.

    Attributes:
        fail: asked before each command on each rank; an error makes that rank answer ok=False.
        delay: asked per command: how many polls its replies are late.
        immediate: carry commands out when sent (one process), not before the next forward pass.
        map_at_most: a rank maps no more blocks than this.
        stuck: ranks that carry nothing out, so that no forward pass can end either.
    """

    def __init__(
        self, ladder: Ladder, sizes: Sequence[RankBytes], ledgers: Ledgers, *, immediate: bool = False
    ) -> None:
        base = ladder[0]
        ranks = [FakeRank(i, list(base.layer_formats), mapped=base.num_kv_blocks) for i in range(len(sizes))]
        super().__init__(ranks, sizes, ledgers)
        self.stuck: set[int] = set()
        self.fail: Fail = lambda command, plan, rank: ""
        self.delay: Callable[[], int] = lambda: 0
        self.immediate = immediate
        self.map_at_most: int | None = None
        self.sent: list[tuple[str, Plan]] = []
        self.keep_sent = True
        self.tickets: list[FakeTicket] = []
        self._queues: list[list[tuple[str, Plan, FakeTicket]]] = [[] for _ in sizes]

    def forward(self, pool: FakePool) -> None:
        """Carry out what was sent, then read every live block on every rank."""
        assert not self.stuck, "a rank that is stuck does not come to its forward pass"
        self.run_commands()
        first = self.ranks[0]
        for rank in self.ranks:
            assert rank.formats == first.formats, "ranks at different levels in one step"
            assert self.map_at_most is not None or rank.mapped == first.mapped
            for block, tag in pool.tags.items():
                assert block < rank.mapped, f"block {block} in use, rank {rank.index} has it not mapped"
                if block in pool.unwritten:
                    rank.contents[block] = tag
                assert rank.contents.get(block) == tag, f"block {block} has lost its content"
            assert pool.num_kv_blocks <= rank.mapped, "published, but not mapped"
        pool.unwritten.clear()

    def run_commands(self) -> None:
        """Carry out what was sent, in order, on ranks that are not stuck."""
        for rank, queue in zip(self.ranks, self._queues, strict=True):
            while queue and rank.index not in self.stuck:
                command, plan, ticket = queue.pop(0)
                ticket.replies[rank.index] = self._obey(command, plan, rank)

    @property
    def num_undrained(self) -> int:
        self.tickets = [ticket for ticket in self.tickets if not ticket.taken]
        return len(self.tickets)

    def _send(self, command: str, plan: Plan) -> FakeTicket:
        ticket = FakeTicket(self.delay(), self.num_ranks)
        if self.keep_sent:
            self.sent.append((command, plan))
        self.tickets.append(ticket)
        assert self.num_undrained <= 4, "beside a pipeline's own steps the ring is full: the engine would dead-lock"
        for queue in self._queues:
            queue.append((command, plan, ticket))
        if self.immediate:
            self.run_commands()
        return ticket

    def _error(self, command: str, plan: Plan, rank: FakeRank) -> str:
        return self.fail(command, plan, rank.index)

    def _mapped(self, rank: FakeRank) -> int:
        return rank.mapped

    def _copy(self, plan: Plan, rank: FakeRank) -> None:
        for source, destination in plan.copies:
            rank.contents[destination] = rank.contents[source]

    def _unmap(self, num_kv_blocks: int, rank: FakeRank) -> None:
        rank.mapped = num_kv_blocks
        rank.contents = {block: tag for block, tag in rank.contents.items() if block < num_kv_blocks}

    def _map(self, num_kv_blocks: int, rank: FakeRank) -> None:
        limit = num_kv_blocks if self.map_at_most is None else self.map_at_most
        rank.mapped = max(rank.mapped, min(num_kv_blocks, limit))


class ScriptedPolicy:
    """Wants the level it is told to want; raises what it is told to raise."""

    predictions = None
    max_level = 99

    def __init__(self) -> None:
        self.level = 0
        self.error: Exception | None = None
        self.seen: Signals | None = None

    def decide(self, signals: Signals) -> Decision:
        self.seen = signals
        if self.error is not None:
            raise self.error
        return Decision(self.level, f"script wants {self.level}")


LAYER_BYTES: Mapping[str, Sequence[int]] = {  # eight layers that differ in size
    BASE_FORMAT: [1000, 1100, 1000, 900, 1000, 1300, 1000, 1000],
    "w8": [520, 560, 520, 470, 520, 660, 520, 520],
    "w4": [300, 310, 300, 270, 300, 390, 300, 300],
}
KV_BLOCK_BYTES = 130
BASE_BLOCKS = 20


def pipeline(layers: Mapping[str, Sequence[int]], kv_block_bytes: int, *cuts: int) -> list[RankBytes]:
    """Stages of a model: `cuts` are the first layers of all stages but the first. KV goes with the layers."""
    num_layers = len(layers[BASE_FORMAT])
    edges = (0, *cuts, num_layers)
    return [
        RankBytes(
            {fmt: [size if start <= i < end else 0 for i, size in enumerate(sizes)] for fmt, sizes in layers.items()},
            kv_block_bytes * (end - start) // num_layers,
        )
        for start, end in pairwise(edges)
    ]


class Rig:
    """Controller, fakes and a clock, wired up."""

    def __init__(
        self,
        *,
        policy: Policy | None = None,
        config: MorphServeConfig | None = None,
        num_ranks: int = 2,
        ranks: Sequence[RankBytes] | None = None,
        immediate: bool = False,
        max_num_blocks: int | None = None,
        layers_per_level: int = 3,
        staging_bytes: int | None = None,
        log: DecisionLog | None = None,
    ) -> None:
        self.script = ScriptedPolicy()
        self.config = config or MorphServeConfig(transition=TransitionConfig(max_layers_per_step=2))
        steps = [
            LadderStep(format="w8", layers_per_level=layers_per_level),
            LadderStep(format="w4", layers_per_level=layers_per_level),
        ]
        self.ranks = ranks or [RankBytes(LAYER_BYTES, KV_BLOCK_BYTES)] * num_ranks
        self.ladder = build_ladder(8, self.ranks, LadderConfig(steps=steps), BASE_BLOCKS, max_num_blocks)
        per_step = self.config.transition.layers_per_step
        staging = [
            largest_batch_bytes(rank.layers, per_step) if staging_bytes is None else staging_bytes
            for rank in self.ranks
        ]
        self.ledgers = make_ledgers(self.ladder, self.ranks, staging)
        self.ledger = self.ledgers[0]
        self.pool = FakePool(BASE_BLOCKS)
        self.executor = FakeExecutor(self.ladder, self.ranks, self.ledgers, immediate=immediate)
        self.monitor = Monitor()
        self.now_s = 0.0
        self.levels: list[int] = []
        self.controller = Controller(
            self.ladder,
            policy or self.script,
            self.pool,
            self.executor,
            self.monitor,
            self.config,
            self.ledgers,
            ranks=self.ranks,
            clock=lambda: self.now_s,
            log=log,
            on_level=self.levels.append,
        )

    def tick(self, *, num_waiting: int = 0, oldest_wait_s: float = 0.0) -> None:
        """The controller's part of a step."""
        self.controller.tick(EngineView(num_waiting, len(self.pool.held), oldest_wait_s))

    def step(self, count: int = 1, *, seconds: float = 0.05) -> None:
        """Whole steps, with every promise checked after each."""
        for _ in range(count):
            self.now_s += seconds
            self.tick()
            self.executor.forward(self.pool)
            self.check()

    def check(self) -> None:
        """What must hold between any two steps."""
        self.pool.check_whole()
        assert all(ledger.used_bytes <= ledger.budget_bytes for ledger in self.ledgers)
        effective_level = self.controller.effective_level
        assert self.pool.num_kv_blocks <= self.ladder[effective_level].num_kv_blocks, "more than the ladder allows"
        allowed = [self.ladder[effective_level].layer_formats, self.ladder[max(effective_level - 1, 0)].layer_formats]
        for rank in self.executor.ranks:
            for layer, fmt in enumerate(rank.formats):
                assert fmt in (allowed[0][layer], allowed[1][layer]), "layers deeper than tokens count for"

    def go_to(self, level: int, *, steps: int = 200) -> None:
        """Ask for `level` and step until it is reached."""
        self.script.level = level
        for _ in range(steps):
            self.step()
            controller = self.controller
            if controller.level == controller.effective_level == level and controller.phase is Phase.IDLE:
                return
        raise AssertionError(f"level {level} not reached: {self.controller.status()}")
