"""The engine's side of the driver: requests on vLLM's real KVCacheManager, each event told to `PoolModel` too."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from seams.pool_harness import MAX_MODEL_LEN, WATERMARK
from seams.pool_model import BLOCK, PoolModel, Prefix
from seams.pool_parts import CheckedPool, make_manager, new_request
from seams.pool_ranks import Forward, Ranks, Work
from vllm.v1.request import Request, RequestStatus

from morphserve.integration.engine.block_pool import VllmBlockPool
from morphserve.integration.engine.provenance import PrefixReuse, Provenance

_VOCABULARY = 2  # few tokens: prefixes meet again


class Requests:
    """They arrive, run, share prefixes, are preempted and end; each of their steps is sent to the ranks.

    Attributes:
        ranks: get the forward passes; set before the first request.
        depth: steps in flight.
        level: that the next step's tokens count for.
    """

    ranks: Ranks

    def __init__(self, rng: random.Random, rule: PrefixReuse, max_blocks: int) -> None:
        self.random = rng
        self.rule = rule
        self.counts: Counter[str] = Counter()
        self.manager, scheduler = make_manager(max_blocks)
        self.port = VllmBlockPool(scheduler)
        self._spy_on_caching()
        self.provenance = Provenance(self.manager, rule)
        self.model = PoolModel(max_blocks, WATERMARK)
        self.pool = CheckedPool(self.port, self.model, self.counts)
        self.depth = 1
        self.level = 0
        self.running: dict[str, Request] = {}
        self.waiting: dict[str, Request] = {}
        self.prefixes: dict[str, list[Prefix]] = {}
        self.demanding: set[str] = set()
        self._ended: list[str] = []
        self._held_back: list[list[Any]] = []
        self._next = 0

    # ---- operations

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

    def drop_all(self) -> None:
        """All requests end, and what was held back comes back."""
        for name in [*self.running, *self.waiting]:
            self._drop(name)
        while self._held_back:
            self.give_back()

    def on_level(self, level: int) -> None:
        """What the engine's hooks do at a switch. Which blocks leave the cache then is the provenance's choice."""
        self.counts["levels"] += 1
        self.provenance.set_level(level)
        self.level = level
        blocks = self.manager.block_pool.blocks
        for block in [i for i in self.model.hashes if blocks[i].block_hash is None]:
            self.model.uncache(block)

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

    def _spy_on_caching(self) -> None:
        """Note what enters the prefix cache: whether it may is the provenance's choice, under what is not."""
        pool = self.manager.block_pool
        insert = pool._insert_block_hash

        def spy(key: Any, block: Any, num_tokens: int | None) -> None:
            insert(key, block, num_tokens=num_tokens)
            self._cached_now.append((block.block_id, key[:-4]))

        pool._insert_block_hash = spy
