"""Random operations on vLLM's real KVCacheManager, resized by the real controller, against `PoolModel` and `Ranks`.

What it proves of `VllmBlockPool`, `Provenance` and `ChunkRunner`, operation by operation: no block is handed out that
some rank has not mapped, none is unmapped that a step in flight still reads, budgets hold, all ranks are at one level
in one step, every request reads its own tokens, and blocks are reused in vLLM's order.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from seams.pool_harness import MAX_MODEL_LEN, WATERMARK
from seams.pool_model import BLOCK, PoolModel, Prefix
from seams.pool_parts import CheckedPool, make_manager, new_request
from seams.pool_ranks import Forward, Ranks, Work
from vllm.v1.request import Request, RequestStatus

from morphserve.config import KVConfig, MorphServeConfig, TransitionConfig
from morphserve.controller import EngineView, largest_chunk_bytes
from morphserve.integration.block_pool import VllmBlockPool
from morphserve.integration.provenance import PrefixReuse, Provenance
from tests.fakes import BASE_BLOCKS, KV_BLOCK_BYTES, LAYER_BYTES, Rig

_STEP_S = 0.05
_VOCABULARY = 2  # few tokens: prefixes meet again


_MAY_REUSE = {
    "any": lambda best, deepest, level: True,
    "not_worse": lambda best, deepest, level: deepest <= level,
    "exact": lambda best, deepest, level: best == deepest == level,
}


class World:
    """One engine of `num_ranks` ranks, driven by `operate`."""

    def __init__(self, seed: int, *, check_every: int = 50) -> None:
        self.random = rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.check_every = check_every
        num_ranks = rng.choice((1, 2, 2, 3))
        self.rule: PrefixReuse = rng.choice(("any", "not_worse", "exact"))
        self.depth = 1  # steps in flight
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
        self.manager, scheduler = make_manager(ladder[-1].num_kv_blocks)
        self.port = VllmBlockPool(scheduler)
        self._spy_on_caching()
        self.provenance = Provenance(self.manager, self.rule)
        self.model = PoolModel(ladder[-1].num_kv_blocks, WATERMARK)
        self.pool = CheckedPool(self.port, self.model, self.counts)
        self.pool.begin_shrink(BASE_BLOCKS)
        self.pool.advance_shrink(0)
        self.pool.finish_shrink()
        budget = ladder[0].weight_bytes + BASE_BLOCKS * KV_BLOCK_BYTES + largest_chunk_bytes(LAYER_BYTES, layers)
        self.ranks = Ranks(num_ranks, ladder, LAYER_BYTES, KV_BLOCK_BYTES, budget, _MAY_REUSE[self.rule])
        self.ranks.published = lambda: self.port.num_kv_blocks
        # The rig's controller, with a real pool and ranks that lag in the place of its fakes.
        self.controller = self.rig.controller
        self.runner = self.controller._runner
        self.controller._pool = self.runner.pool = self.pool  # type: ignore[assignment]
        self.runner.executor = self.ranks
        self.controller._on_level = self._on_level
        self.running: dict[str, Request] = {}
        self.waiting: dict[str, Request] = {}
        self.prefixes: dict[str, list[Prefix]] = {}
        self.demanding: set[str] = set()
        self.level = 0
        self._ended: list[str] = []
        self._held_back: list[list[Any]] = []
        self._next = 0
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
        assert not self.controller.tripped, f"the controller gave up: {self.controller.status()['counters']}"

    def check_all(self) -> None:
        self.counts["full_checks"] += 1
        self.model.compare(self.manager.block_pool, self.manager)

    def wind_down(self) -> None:
        """No sequence of ends, and no failure, keeps level 0 from being reached or a block from coming back."""
        for rank in self.ranks.ranks:
            rank.fails, rank.map_at_most = False, None
        self.ranks.delay = 0
        self.rig.script.level = 0
        for name in [*self.running, *self.waiting]:
            self._drop(name)
        while self._held_back:
            self.give_back()
        for _ in range(4000):  # a back-off may last a minute
            self.tick()
            self.run_all()
            self.check_cheaply()
            if self.controller.exposure_level == 0 and not self.controller.in_transition:
                break
        self.check_all()
        assert self.controller.exposure_level == 0 and not self.controller.in_transition, self.controller.status()
        assert self.port.num_kv_blocks == BASE_BLOCKS == len(self.model.free) + 1

    # ---- operations of the engine

    def arrive(self) -> None:
        """A new prompt, or one that shares its beginning with another's."""
        if len(self.waiting) > 3:
            return
        rng = self.random
        tokens = rng.choices(range(_VOCABULARY), k=rng.randint(1, 18))
        if self.prefixes and rng.random() < 0.4:
            tokens = (list(rng.choice(list(self.prefixes.values()))[-1]) + tokens[: rng.randint(0, 3)])[:20]
        self._next += 1
        name = f"r{self._next}"
        request = new_request(name, tokens)
        self.prefixes[name] = [bytes(tokens[: i + 1]) for i in range(len(tokens))]
        if rng.random() < 0.2:
            self.demanding.add(name)
            self.provenance.demand_full_precision(name)
        self.waiting[name] = request
        self._admit(name)

    def admit(self) -> None:
        """A waiting request, perhaps one that was preempted, tries again."""
        if self.waiting:
            self._admit(self.random.choice(list(self.waiting)))

    def decode(self) -> None:
        """Another chunk of the prompt, or one token more."""
        if not self.running:
            return
        name = self.random.choice(list(self.running))
        request = self.running[name]
        if request.num_computed_tokens == request.num_tokens:
            if request.num_tokens >= MAX_MODEL_LEN - 1:
                self._drop(name)
                return
            token = self.random.randrange(_VOCABULARY)
            request.append_output_token_ids(token)
            self.prefixes[name].append(self.prefixes[name][-1] + bytes((token,)))
        if not self._schedule(name, request, [], 0):
            self._preempt(name)

    def end(self) -> None:
        """A request ends or is aborted, in whatever state."""
        if live := [*self.running, *self.waiting]:
            self._drop(self.random.choice(live))

    def end_late(self) -> None:
        """The scheduler has done with a request and gives its blocks back some steps later."""
        if self.running and len(self._held_back) < 2:
            name = self.random.choice(list(self.running))
            blocks = self.manager.pop_blocks_for_free(self.running[name])
            self.model.held_back.append(self.model.tables.pop(name))
            self._held_back.append(blocks)
            self._forget(name)

    def give_back(self) -> None:
        if self._held_back:
            self.counts["held_back"] += 1
            self.manager.block_pool.free_blocks(reversed(self._held_back.pop(0)))
            self.model.release(self.model.held_back.pop(0))

    def preempt(self) -> None:
        if self.running:
            self._preempt(self.random.choice(list(self.running)))

    def evict(self) -> None:
        """Cached blocks are found out to be of no use, in whatever state they are."""
        if known := list(self.model.hashes):
            blocks = self.random.sample(known, min(3, len(known)))
            self.manager.evict_blocks(set(blocks))
            for block in blocks:
                self.model.uncache(block)

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

    # ---- parts

    def _admit(self, name: str) -> None:
        request = self.waiting[name]
        found, num_hit, _ = self.manager.get_computed_blocks(request)
        hits = [block.block_id for block in found.blocks[0]]
        prefixes = self.prefixes[name]
        for i, block in enumerate(hits):
            assert self.model.hashes.get(block) == prefixes[(i + 1) * BLOCK - 1], "a hit on other tokens"
        if self.rule == "any" and name not in self.demanding:
            assert hits == self._expected_hits(prefixes), "hits"
        self.counts["lookups"] += 1
        self.counts["prefix_hits"] += len(hits)
        if self._schedule(name, request, hits, num_hit, found):
            del self.waiting[name]
            self.running[name] = request
            request.status = RequestStatus.RUNNING

    def _expected_hits(self, prefixes: list[Prefix]) -> list[int]:
        hits = []
        for end in range(BLOCK, len(prefixes), BLOCK):
            blocks = self.model.cached.get(prefixes[end - 1])
            if blocks is None:
                break
            hits.append(blocks[0])
        return hits

    def _schedule(self, name: str, request: Request, hits: list[int], num_hit: int, found: Any = None) -> bool:
        """Slots for all or, of a prompt, some of what is not computed; then the forward pass is on its way."""
        first = request.num_computed_tokens + num_hit
        count = request.num_tokens - first
        if count > 4 and self.random.random() < 0.3:
            count = self.random.randint(1, count)
        starts = name not in self.running
        self._cached_now: list[tuple[int, Prefix]] = []
        before = len(self.model.tables.get(name, ()))
        new = self.manager.allocate_slots(request, count, num_hit, found)
        expected = self.model.allocate(name, first + count, hits, admission=starts)
        assert (new is not None) == expected, "room"
        if new is None:
            self.counts["no_room"] += 1
            return False
        ids = [block.block_id for block in self.manager.get_blocks(name).blocks[0]]
        assert ids == self.model.tables[name], "blocks of an allocation"
        for block, prefix in self._cached_now:
            assert prefix == self.prefixes[name][len(prefix) - 1], "cached under other tokens"
            self.model.cache(block, prefix)
        request.num_computed_tokens = first + count
        work = Work(
            name,
            starts,
            ids if starts else ids[before:],
            first,
            self.prefixes[name][: first + count],
            demands_full=name in self.demanding,
        )
        step = Forward(self.level, self.port.num_kv_blocks, [work], self._ended)
        self._ended = []
        self.ranks.forward(step, self.depth)
        self.counts["forwards"] += 1
        return True

    def _preempt(self, name: str) -> None:
        self.counts["preempt"] += 1
        request = self.running.pop(name)
        self.manager.free(request)
        self.model.release(self.model.tables.pop(name))
        request.num_computed_tokens = 0
        request.status = RequestStatus.PREEMPTED
        self.waiting[name] = request
        self._ended.append(name)

    def _drop(self, name: str) -> None:
        request = self.running.get(name)
        if request is not None:
            self.manager.free(request)
            self.model.release(self.model.tables.pop(name))
        self._forget(name)

    def _forget(self, name: str) -> None:
        self.running.pop(name, None)
        self.waiting.pop(name, None)
        self.demanding.discard(name)
        del self.prefixes[name]
        self.provenance.forget(name)
        self._ended.append(name)

    def _on_level(self, level: int) -> None:
        """What the engine's glue does at a switch. Which blocks leave the cache then is the provenance's choice."""
        self.counts["levels"] += 1
        self.provenance.set_level(level)
        self.level = level
        blocks = self.manager.block_pool.blocks
        for block in [i for i in self.model.hashes if blocks[i].block_hash is None]:
            self.model.uncache(block)

    def _spy_on_caching(self) -> None:
        """Note what enters the prefix cache: whether it may is the provenance's choice, under what is not."""
        pool = self.manager.block_pool
        insert = pool._insert_block_hash

        def spy(key: Any, block: Any, num_tokens: int | None) -> None:
            insert(key, block, num_tokens=num_tokens)
            self._cached_now.append((block.block_id, key[:-4]))

        pool._insert_block_hash = spy


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
