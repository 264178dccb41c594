"""The prefix cache as it should be: an LRU of so many blocks, with no ids and no tail. And a load to compare on.

vLLM's rules: blocks of running requests stay; a request that ends gives its blocks back last one first, empty ones to
the front of the queue and cached ones to its end; new blocks come from the front. `resize` to fewer gives up what
stands at the front of the queue, to more puts empty blocks behind the empty ones there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from seams.pool_model import BLOCK
from seams.pool_parts import make_manager, new_request
from vllm.v1.request import Request

from morphserve.integration.engine.block_pool import VllmBlockPool

Tokens = tuple[int, ...]


@dataclass(eq=False, slots=True)
class _Block:
    holds: Tokens | None = None
    refs: int = 0


@dataclass
class LruOfBlocks:
    """`size` blocks, vLLM's null block not among them."""

    size: int
    owed: int = 0  # blocks to give up as soon as they are free
    free: list[_Block] = field(init=False)
    known: dict[Tokens, list[_Block]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = [_Block() for _ in range(self.size)]

    def start(self, tokens: Tokens) -> tuple[int, list[_Block]] | None:
        """Hits and blocks of a request; None if there is no room."""
        table: list[_Block] = []
        while (end := (len(table) + 1) * BLOCK) < len(tokens) and tokens[:end] in self.known:
            table.append(self.known[tokens[:end]][0])
        hits = len(table)
        need = -(-len(tokens) // BLOCK) - hits
        if need + sum(block.refs == 0 for block in table) > len(self.free):
            return None
        for block in table:
            if block.refs == 0:
                self.free.remove(block)
        fresh, self.free = self.free[:need], self.free[need:]
        for block in fresh:
            self._forget(block)
        table += fresh
        for number, block in enumerate(table):
            block.refs += 1
            if (end := (number + 1) * BLOCK) <= len(tokens) and block.holds is None:
                block.holds = tokens[:end]
                self.known.setdefault(block.holds, []).append(block)
        return hits, table

    def end(self, table: list[_Block]) -> None:
        for block in table:
            block.refs -= 1
        freed = [block for block in reversed(table) if block.refs == 0]
        self.free = [b for b in freed if b.holds is None] + self.free + [b for b in freed if b.holds is not None]
        self._pay()

    def resize(self, size: int) -> None:
        if size < self.size:
            self.owed += self.size - size
        else:
            empty = sum(1 for _ in itertools.takewhile(lambda block: block.holds is None, self.free))
            self.free[empty:empty] = [_Block() for _ in range(size - self.size)]
        self.size = size
        self._pay()

    def _pay(self) -> None:
        count = min(self.owed, len(self.free))
        gone, self.free = self.free[:count], self.free[count:]
        self.owed -= count
        for block in gone:
            self._forget(block)

    def _forget(self, block: _Block) -> None:
        if block.holds is not None:
            self.known[block.holds].remove(block)
            if not self.known[block.holds]:
                del self.known[block.holds]
            block.holds = None


class RealCache:
    """The same questions to vLLM's pool, resized by `VllmBlockPool`, which moves `copies` blocks per request."""

    def __init__(self, size: int, copies: int) -> None:
        self.manager, scheduler = make_manager(size + 1)
        self.manager.watermark_blocks = 0
        self.port = VllmBlockPool(scheduler)
        self.copies = copies
        self.num_copied = 0
        self._names = itertools.count()

    def start(self, tokens: Tokens) -> tuple[int, Request] | None:
        self._drain()
        request = new_request(f"r{next(self._names)}", list(tokens))
        found, num_hit, _ = self.manager.get_computed_blocks(request)
        if self.manager.allocate_slots(request, len(tokens) - num_hit, num_hit, found) is None:
            return None
        request.num_computed_tokens = len(tokens)
        return num_hit // BLOCK, request

    def end(self, request: Request) -> None:
        self.manager.free(request)

    def resize(self, size: int) -> None:
        (self.port.begin_shrink if size + 1 < self.port.num_kv_blocks else self.port.grow)(size + 1)
        self.manager.watermark_blocks = 0

    def _drain(self) -> None:
        if self.port._limit is not None:  # a shrink is in progress
            progress = self.port.advance_shrink(self.copies)
            self.num_copied += len(progress.copies)
            if progress.num_live_tail == 0:
                self.port.finish_shrink()
                self.manager.watermark_blocks = 0


def zipf_prompts(seed: int, num_prefixes: int = 60) -> Iterator[Tokens]:
    """A common prefix of four blocks, the k-th most frequent in proportion to 1/k, and a tail of its own."""
    rng = random.Random(seed)
    weights = [1 / (k + 1) for k in range(num_prefixes)]
    while True:
        yield _prompt(rng, rng.choices(range(num_prefixes), weights)[0])


def recent_prompts(seed: int, num_recent: int = 12) -> Iterator[Tokens]:
    """Conversations: three prompts of four go on with one of the last prefixes, the fourth begins a new one."""
    rng = random.Random(seed)
    for newest in itertools.count():
        yield _prompt(rng, newest)
        while rng.random() < 0.75:
            yield _prompt(rng, max(0, newest - rng.randrange(num_recent)))


def _prompt(rng: random.Random, prefix: int) -> Tokens:
    tail = rng.choices(range(256), k=rng.randint(1, 7))
    return (*(prefix // 256 % 256, prefix % 256) * (2 * BLOCK), *tail)


def hits_by_phase(cache: Any, prompts: Iterator[Tokens], sizes: list[int], requests: int, running: int) -> list[int]:
    """Blocks hit in each phase: `requests` requests, `running` at once, at each of `sizes` in turn."""
    held: list[Any] = []
    found = []
    for number, size in enumerate(sizes):
        if number:
            cache.resize(size)
        hits = 0
        for prompt in itertools.islice(prompts, requests):
            while (started := cache.start(prompt)) is None:
                cache.end(held.pop(0))
            hits += started[0]
            held.append(started[1])
            if len(held) > running:
                cache.end(held.pop(0))
        found.append(hits)
    return found
