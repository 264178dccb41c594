"""Random operations on vLLM's real KVCacheManager, resized by the real controller, against `PoolModel` and `Ranks`.

What it proves of `VllmBlockPool`, `Provenance` and `SwapRunner`, operation by operation: no block is handed out that
some rank has not mapped, none is unmapped that a step in flight still reads, budgets hold, all ranks are at one level
in one step, every request reads its own tokens, and blocks are reused in vLLM's order.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from seams.pool_ranks import Ranks
from seams.pool_requests import Requests

from morphserve.config import KVConfig, MorphServeConfig, TransitionConfig
from morphserve.control import EngineView
from morphserve.integration.engine.provenance import PrefixReuse
from tests.fakes import BASE_BLOCKS, Rig

_STEP_S = 0.05

_MAY_REUSE = {
    "any": lambda best, deepest, level: True,
    "not_worse": lambda best, deepest, level: deepest <= level,
    "exact": lambda best, deepest, level: best == deepest == level,
}


class World(Requests):
    """One engine of `num_ranks` ranks, driven by `operate`."""

    def __init__(self, seed: int, *, check_every: int = 50) -> None:
        rng = random.Random(seed)
        self.check_every = check_every
        num_ranks = rng.choice((1, 2, 2, 3))
        rule: PrefixReuse = rng.choice(("any", "not_worse", "exact"))
        layers = rng.choice((1, 2, 3))
        self.rig = Rig(
            config=MorphServeConfig(
                kv=KVConfig(migrate_blocks_per_step=rng.choice((1, 1, 4, 16)), drain_timeout_s=0.5),
                transition=TransitionConfig(max_layers_per_step=layers, backoff_s=0.3),
            ),
            num_ranks=num_ranks,
            layers_per_level=rng.choice((2, 4, 8)),
        )
        ladder = self.rig.ladder
        super().__init__(rng, rule, ladder[-1].num_kv_blocks)
        self.pool.begin_shrink(BASE_BLOCKS)
        self.pool.advance_shrink(0)
        self.pool.finish_shrink()
        self.ranks = Ranks(ladder, self.rig.ranks, self.rig.ledgers, _MAY_REUSE[rule])
        self.ranks.published = lambda: self.port.num_kv_blocks
        # The rig's controller, with a real pool and ranks that lag in the place of its fakes.
        self.controller = self.rig.controller
        self.runner = self.controller._runner
        self.controller._pool = self.runner.pool = self.pool  # type: ignore[assignment]
        self.runner.executor = self.ranks
        self.controller._on_level = self.on_level
        self._names, self._weights = zip(*OPERATIONS.items(), strict=True)

    # ---- driving

    def run(self, operations: int) -> None:
        """Any `operations` of them."""
        chosen = self.random.choices(self._names, self._weights, k=operations)
        for number, name in enumerate(chosen, 1):
            getattr(self, name)()
            self.counts["operations"] += 1
            self.check_cheaply()
            if number % self.check_every == 0:
                self.check_all()
        self.check_all()

    def check_cheaply(self) -> None:
        self.ranks.check()
        assert self.port.num_kv_blocks == self.model.published
        assert not self.controller.failed, f"the controller gave up: {self.controller.status()['counters']}"

    def check_all(self) -> None:
        self.counts["full_checks"] += 1
        self.model.compare(self.manager.block_pool, self.manager)

    def wind_down(self) -> None:
        """No sequence of ends, and no failure, keeps level 0 from being reached or a block from coming back."""
        for rank in self.ranks.ranks:
            rank.fails, rank.map_at_most = False, None
        self.ranks.delay = 0
        self.rig.script.level = 0
        self.drop_all()
        for _ in range(4000):  # a back-off may last a minute
            self.tick()
            self.run_all()
            self.check_cheaply()
            if self.controller.effective_level == 0 and not self.controller.in_transition:
                break
        self.check_all()
        assert self.controller.effective_level == 0 and not self.controller.in_transition, self.controller.status()
        assert self.port.num_kv_blocks == BASE_BLOCKS == len(self.model.free) + 1

    # ---- operations of the controller and its ranks

    def want(self) -> None:
        self.rig.script.level = self.random.randrange(len(self.rig.ladder))

    def turn_around(self) -> None:
        """In mid-transition, the other way."""
        wanted = self.rig.script.level
        self.rig.script.level = 0 if wanted else len(self.rig.ladder) - 1

    def tick(self) -> None:
        self.rig.now_s += _STEP_S
        self.controller.tick(EngineView(len(self.waiting), len(self.running), 0.0))

    def run_one(self) -> None:
        """One rank goes on, the others do not."""
        for _ in range(self.random.randint(1, 3)):
            self.ranks.run(self.random.choice(self.ranks.ranks))

    def run_all(self) -> None:
        for rank in self.ranks.ranks:
            while self.ranks.run(rank):
                pass

    def change_depth(self) -> None:
        self.depth = self.random.randint(0, 2)

    def change_delay(self) -> None:
        self.ranks.delay = self.random.choice((0, 0, 1, 4))

    def fail_rank(self) -> None:
        """One rank does not prepare, or maps less than it is asked to."""
        self.counts["rank_failures"] += 1
        rank = self.random.choice(self.ranks.ranks)
        if self.random.random() < 0.5:
            rank.fails = True
        else:
            rank.map_at_most = self.random.randint(BASE_BLOCKS, BASE_BLOCKS + 40)

    def mend(self) -> None:
        for rank in self.ranks.ranks:
            rank.fails, rank.map_at_most = False, None


OPERATIONS = {
    "arrive": 14,
    "admit": 8,
    "decode": 34,
    "end": 5,
    "end_late": 1,
    "give_back": 1,
    "preempt": 2,
    "evict": 0.5,
    "want": 1,
    "turn_around": 2,
    "tick": 20,
    "run_one": 10,
    "run_all": 1,
    "change_depth": 0.5,
    "change_delay": 0.5,
    "fail_rank": 0.4,
    "mend": 1,
}


def drive(
    operations: int,
    seed: int,
    *,
    per_world: int = 5000,
    check_every: int = 50,
    prepare: Callable[[World], None] = lambda world: None,
) -> Counter[str]:
    """`operations` in worlds of `per_world`, each with its own configuration.

    Args:
        prepare: done to each world before it runs.

    Raises:
        AssertionError: names the world's seed; `World(seed).run(per_world)` does it again.
    """
    counts: Counter[str] = Counter()
    for number in range(-(-operations // per_world)):
        world_seed = seed * 1_000_003 + number
        world = World(world_seed, check_every=check_every)
        prepare(world)
        try:
            world.run(min(per_world, operations - number * per_world))
            world.wind_down()
        except Exception as e:
            done = world.counts["operations"]
            raise AssertionError(f"World({world_seed}) after {done} operations: {type(e).__name__}: {e}") from e
        counts += world.counts
        counts["worlds"] += 1
    return counts
