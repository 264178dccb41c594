"""Random operations on vLLM's real pool under the real controller; and each fault that they must catch, planted."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from seams.pool_driver import OPERATIONS, World, drive
from seams.pool_ranks import Command, Forward, Rank

from morphserve.control import Plan
from morphserve.control.runner import SwapRunner

_HAPPENED = ("grow", "begin_shrink", "blocks_copied", "finish_shrink", "cancel_shrink", "preempt", "prefix_hits")
_HAPPENED += ("no_room", "levels", "rank_failures", "held_back", "forwards")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of planned aborts are no news."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_many_operations() -> None:
    """Guards rules 1, 2, 4 and 8 and the order of the free queue, against any order of events."""
    counts = drive(60_000, seed=1)
    assert all(counts[what] >= 25 for what in _HAPPENED), counts


def test_other_operations_each_time() -> None:
    """The same where nobody has looked yet; the failure names the world."""
    drive(40_000, seed=random.SystemRandom().randrange(1_000_000))


class WorldMachine(RuleBasedStateMachine):
    """The driver's operations in an order that hypothesis chooses, and shortens when it finds a failure."""

    @initialize(seed=st.integers(0, 10**6))
    def build(self, seed: int) -> None:
        logging.disable(logging.WARNING)
        self.world = World(seed)

    @rule(name=st.sampled_from(sorted(OPERATIONS)), times=st.integers(1, 6))
    def operate(self, name: str, times: int) -> None:
        for _ in range(times):
            getattr(self.world, name)()
            self.world.check_cheaply()

    @invariant()
    def everything_holds(self) -> None:
        """Guards against a step in flight, a rank that fails or lags, or a turn-around that corrupts the KV."""
        if hasattr(self, "world"):
            self.world.check_all()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.wind_down()
        logging.disable(logging.NOTSET)


TestWorld = WorldMachine.TestCase
TestWorld.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)


# ---- faults


def skip_copies(world: World) -> None:
    world.ranks.copy = lambda rank, copies: None  # type: ignore[method-assign]


def keep_tables(world: World) -> None:
    world.ranks.rewrite = lambda rank, renamed: None  # type: ignore[method-assign]


def forget_hashes(world: World) -> None:
    real, lookup = world.port._exchange_ids, world.manager.block_pool.cached_block_hash_to_block

    def exchange(block: Any, target: Any) -> None:
        insert, lookup.insert = lookup.insert, lambda key, block: None
        real(block, target)
        lookup.insert = insert

    world.port._exchange_ids = exchange  # type: ignore[method-assign]


def keep_old_ids_in_the_cache(world: World) -> None:
    """Only entries that several blocks share are keyed by id: a fault that most hits do not show."""

    def exchange(block: Any, target: Any) -> None:
        pool, high, low = world.manager.block_pool, block.block_id, target.block_id
        block.block_id, target.block_id = low, high
        pool.blocks[low], pool.blocks[high] = block, target
        del world.port._tail[high]

    world.port._exchange_ids = exchange  # type: ignore[method-assign]


def on_send(world: World, action: Callable[[Plan], None]) -> None:
    send = world.ranks._send

    def also(kind: str, plan: Plan) -> Any:
        if kind in ("commit", "alone"):
            action(plan)
        return send(kind, plan)

    world.ranks._send = also  # type: ignore[method-assign]


def publish_before_mapping(world: World) -> None:
    def publish(plan: Plan) -> None:
        if plan.num_kv_blocks > world.port.num_kv_blocks and world.port._limit is None:
            world.pool.grow(plan.num_kv_blocks)

    on_send(world, publish)


def unmap_at_once(world: World) -> None:
    """Not in the queue, behind the steps under way."""

    def unmap(plan: Plan) -> None:
        for rank in world.ranks.ranks:
            for block in range(plan.num_kv_blocks, len(rank.kv)):
                del rank.kv[block]

    on_send(world, unmap)


def unmap_before_the_tail_is_free(world: World) -> None:
    begin = world.pool.begin_shrink

    def begin_and_unmap(num_kv_blocks: int) -> None:
        begin(num_kv_blocks)
        world.ranks._send("commit", Plan(world.runner.revision, (), num_kv_blocks))

    world.pool.begin_shrink = begin_and_unmap  # type: ignore[method-assign]


def one_rank_late(world: World) -> None:
    """It takes a command only after the forward pass behind it."""
    ranks = world.ranks
    run = ranks.run

    def run_late(rank: Rank) -> bool:
        item, then = [*ranks._ahead(rank)[:2], None, None][:2]
        if rank is not ranks.ranks[-1] or type(item) is not Command or type(then) is not Forward:
            return run(rank)
        rank.position += 1
        run(rank)
        item.ticket.replies[rank.index] = ranks._obey(item.kind, item.plan, rank)
        return True

    ranks.run = run_late  # type: ignore[method-assign]


def free_the_hottest(world: World) -> None:
    """The shrink takes from the wrong end of the queue: correct, but the prefix cache loses what it needs most."""
    queue = world.manager.block_pool.free_block_queue
    real = world.port._balance

    def balance() -> None:
        popleft_n = queue.popleft_n

        def pop_n(count: int) -> list[Any]:
            blocks = queue.get_all_free_blocks()[::-1][:count]
            for block in blocks:
                queue.remove(block)
            return blocks

        queue.popleft_n = pop_n
        real()
        queue.popleft_n = popleft_n

    world.port._balance = balance  # type: ignore[method-assign]


def leave_freed_blocks(world: World) -> None:
    real = world.port._hook_free

    def hook_and_undo() -> None:
        real()
        world.port._free_hook.undo()

    world.port._hook_free = hook_and_undo  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "plant",
    [
        skip_copies,
        keep_tables,
        forget_hashes,
        keep_old_ids_in_the_cache,
        publish_before_mapping,
        unmap_at_once,
        unmap_before_the_tail_is_free,
        one_rank_late,
        free_the_hottest,
        leave_freed_blocks,
    ],
)
def test_planted_faults_are_caught(plant: Callable[[World], None]) -> None:
    """Guards against a driver that no longer sees what it is for."""
    with pytest.raises(AssertionError, match="World"):
        drive(20_000, seed=1, prepare=plant)


def test_a_rank_that_maps_less_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against publishing what was asked for, when one rank has mapped less."""
    monkeypatch.setattr(SwapRunner, "_grow", lambda self, num_kv_blocks, *rest, **more: self.pool.grow(num_kv_blocks))
    with pytest.raises(AssertionError, match="maps"):
        drive(20_000, seed=1)
