"""The controller against random load, random targets, random delays and random failures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from morphserve.config import KVConfig, MorphServeConfig, TransitionConfig
from morphserve.control import Phase
from morphserve.control.budget import RankBytes
from tests.fakes import BASE_BLOCKS, KV_BLOCK_BYTES, LAYER_BYTES, Rig, pipeline

pytestmark = pytest.mark.cpu


class AnyHistory(RuleBasedStateMachine):
    """Guards rules 1, 2, 4, 6 and 8: the fakes assert them at every command and forward pass."""

    @initialize(
        num_ranks=st.integers(1, 3),
        immediate=st.booleans(),
        layers=st.integers(1, 8),
        per_level=st.integers(1, 8),
        copies=st.integers(1, 4),
        cap=st.none() | st.integers(BASE_BLOCKS, BASE_BLOCKS + 40),
        cuts=st.sets(st.integers(1, 7), max_size=2),
        in_background=st.booleans(),
        granularity=st.sampled_from((1, 2, 5)),
    )
    def build(
        self,
        num_ranks: int,
        immediate: bool,
        layers: int,
        per_level: int,
        copies: int,
        cap: int | None,
        cuts: set[int],
        in_background: bool,
        granularity: int,
    ) -> None:
        config = MorphServeConfig(
            kv=KVConfig(migrate_blocks_per_step=copies, drain_timeout_s=0.5),
            transition=TransitionConfig(max_layers_per_step=layers, backoff_s=0.3, rank_timeout_s=0.5),
        )
        plain = [RankBytes(LAYER_BYTES, KV_BLOCK_BYTES)] * num_ranks
        stages = pipeline(LAYER_BYTES, KV_BLOCK_BYTES * 8, *sorted(cuts)) if cuts else plain
        self.rig = Rig(
            config=config,
            ranks=[replace(rank, kv_granularity=granularity) for rank in stages],
            immediate=immediate,
            layers_per_level=per_level,
            max_num_blocks=cap,
        )
        self.rig.executor.in_background = in_background
        self.next_request = 0

    @rule(fraction=st.floats(0, 1))
    def want(self, fraction: float) -> None:
        self.rig.script.level = round(fraction * (len(self.rig.ladder) - 1))

    @rule(blocks=st.integers(1, 12))
    def arrive(self, blocks: int) -> None:
        if self.rig.pool.allocate(self.next_request, blocks):
            self.next_request += 1
            self.rig.executor.forward(self.rig.pool)

    @precondition(lambda self: self.rig.pool.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.rig.pool.finish(data.draw(st.sampled_from(sorted(self.rig.pool.held))))

    @rule(delays=st.lists(st.integers(0, 4), min_size=1, max_size=5))
    def answer_late(self, delays: list[int]) -> None:
        order = iter(delays * 10_000)
        self.rig.executor.delay = lambda: next(order)

    @rule(rank=st.integers(0, 2))
    def break_prepare(self, rank: int) -> None:
        self.rig.executor.fail = lambda command, plan, r: (
            "broken" if command in ("prepare", "alone") and r == rank else ""
        )

    @rule(ranks=st.sets(st.integers(0, 2), min_size=1), ticks=st.integers(1, 25))
    def stall(self, ranks: set[int], ticks: int) -> None:
        """Some ranks stand still for a while, and no step ends; the time-out is 10 ticks."""
        self.rig.executor.stuck = ranks
        for _ in range(ticks):
            self.rig.now_s += 0.05
            self.rig.tick()
            self.rig.executor.run_commands()
            self.rig.check()
        self.rig.executor.stuck = set()

    @rule(limit=st.integers(BASE_BLOCKS, BASE_BLOCKS + 60))
    def map_short(self, limit: int) -> None:
        self.rig.executor.map_at_most = limit

    @rule()
    def mend(self) -> None:
        self.rig.executor.fail = lambda command, plan, r: ""
        self.rig.executor.map_at_most = None

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        self.rig.step(count)

    @invariant()
    def never_fails(self) -> None:
        if hasattr(self, "rig"):
            assert not self.rig.controller.failed, self.rig.controller.status()

    def teardown(self) -> None:
        """Without failures every level can be reached, and level 0 is where it all began."""
        if not hasattr(self, "rig"):
            return
        rig = self.rig
        self.mend()
        rig.executor.delay = lambda: 0
        for request in list(rig.pool.held):
            rig.pool.finish(request)
        for level in (len(rig.ladder) - 1, 0):
            rig.go_to(level, steps=600)
            rig.step(3)
            assert rig.controller.phase is Phase.IDLE
            for ledger, rank in zip(rig.ledgers, rig.ranks, strict=True):
                assert ledger["weights"] == rank.weight(rig.ladder[level].layer_formats)
                assert ledger["staging"] == 0
            assert rig.executor.num_undrained == 0
        assert rig.pool.num_kv_blocks == BASE_BLOCKS and len(rig.pool.free) == BASE_BLOCKS - 1
        assert not rig.controller.wants_wakeup


AnyHistory.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestAnyHistory = AnyHistory.TestCase
