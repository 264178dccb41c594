"""The scheduler's model with a prefix cache: blocks have contents, and free ones keep them until they are taken."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from morphserve.tools.sim.pool import SimPool
from morphserve.tools.sim.request import SimRequest, State
from morphserve.tools.sim.scheduler import SimScheduler
from morphserve.tools.sim.server import SimServer
from morphserve.tools.workload import Workload

PrefixReuse = Literal["any", "not_worse", "exact"]


@dataclass(slots=True, eq=False)
class _Block:
    """One KV block that a request holds, or that is free and still cached."""

    num_holders: int = 1
    content: Hashable = None  # all tokens up to its end; None = not full, or nobody's
    level: int = 0  # it was written at


@dataclass(slots=True)
class PromptContents:
    """The contents of each prompt's full KV blocks, as far as the trace's hash ids tell."""

    block_size: int
    block_tokens: int  # one hash id stands for
    hash_ids: Sequence[Sequence[int]]  # by request
    _chains: dict[tuple[int, int], int] = field(default_factory=dict)  # (chain before, hash id) |-> chain

    @classmethod
    def of(cls, workload: Workload, block_size: int) -> PromptContents:
        """Read the contents of all requests of a workload."""
        return cls(block_size, workload.block_tokens, [request.hash_ids for request in workload.requests])

    def contents(self, request: SimRequest) -> list[Hashable]:
        """Return the contents of its full prompt blocks, in order: equal ones have equal tokens up to their end."""
        chain, chains = -1, []
        for hash_id in self.hash_ids[request.index]:
            chain = self._chains.setdefault((chain, hash_id), len(self._chains))
            chains.append(chain)
        num_full = request.prompt_tokens // self.block_size
        if not chains:
            return [own_content(request, at) for at in range(num_full)]
        ends = (((at + 1) * self.block_size - 1) // self.block_tokens for at in range(num_full))
        # The last id stands for all that is left of the prompt.
        return [(chains[min(end, len(chains) - 1)], at) for at, end in enumerate(ends)]


def own_content(request: SimRequest, at: int) -> Hashable:
    """Return the content of a block that no other request has."""
    return ("of", request.index, at)


class CachingScheduler(SimScheduler):
    """A `SimScheduler` with a cache like vLLM's.

    1. A request that is admitted takes over cached blocks from its beginning on, as far as they reach, but computes its
       last token itself. Those that nobody else holds must find room like new ones.
    2. Free blocks without contents are taken first, then the least recently freed; of one request the last ones first.
    3. What a level may not reuse (`kv.prefix_reuse`) is not found.
    """

    def __init__(self, server: SimServer, pool: SimPool, prompts: PromptContents, reuse: PrefixReuse = "any") -> None:
        super().__init__(server, pool)
        self._prompts = prompts
        self._reuse = reuse
        self._contents: dict[SimRequest, list[Hashable]] = {}
        self._tables: dict[SimRequest, list[_Block]] = {}
        self._cached: dict[Hashable, dict[_Block, None]] = {}  # several may have the same contents; the first counts
        self._idle: dict[_Block, None] = {}  # cached and held by nobody, least recently freed first
        self.hit_tokens = 0
        pool.cached = lambda: len(self._idle)

    # ---- the pool

    def _new_block(self) -> _Block:
        self._trim(1)
        self.pool.used += 1
        return _Block()

    def _trim(self, num_new: int = 0) -> None:
        """Evict what has no room beside `num_new` more blocks."""
        while self._idle and self.pool.used + len(self._idle) + num_new > self.pool.capacity:
            block = next(iter(self._idle))
            del self._idle[block]
            self._forget(block)

    def _forget(self, block: _Block) -> None:
        same = self._cached[block.content]
        del same[block]
        if not same:
            del self._cached[block.content]

    def _keep(self, request: SimRequest, num_tokens: int) -> None:
        """Let its blocks that so many tokens have filled be found from now on."""
        table = self._tables[request]
        for at in range(num_tokens // self._block_size):
            block = table[at]
            if block.content is None:
                block.content, block.level = self._content(request, at), self.level
                self._cached.setdefault(block.content, {})[block] = None

    def _content(self, request: SimRequest, at: int) -> Hashable:
        contents = self._contents.get(request)
        if contents is None:
            contents = self._contents[request] = self._prompts.contents(request)
        return contents[at] if at < len(contents) else own_content(request, at)

    def _find(self, request: SimRequest, num_blocks: int) -> list[_Block]:
        """Return its first blocks, up to so many, as far as they are cached without a gap."""
        found: list[_Block] = []
        for at in range(num_blocks):
            same = self._cached.get(self._content(request, at))
            block = next((b for b in same if self._may_reuse(b)), None) if same else None
            if block is None:
                break
            found.append(block)
        return found

    def _may_reuse(self, block: _Block) -> bool:
        if self._reuse == "any":
            return True
        return block.level == self.level if self._reuse == "exact" else block.level <= self.level

    # ---- what the scheduler asks for

    def _release(self, request: SimRequest) -> None:
        # Contents of its answer are nobody else's: soon enough to keep them now.
        self._keep(request, self._computed(request) - self._unsure(request))
        freed = 0
        for block in reversed(self._tables.pop(request)):
            block.num_holders -= 1
            if not block.num_holders:
                freed += 1
                if block.content is not None:
                    self._idle[block] = None
        self.pool.release(freed)
        self._trim()

    def _unsure(self, request: SimRequest) -> int:
        """Return tokens in its blocks that vLLM does not vouch for yet: one, while a step of its answer runs."""
        ends = request.state is State.ENDING and request.last_step == self.step - 1
        decodes = ends or request.state is State.DECODE
        return int(self._in_flight > 0 and decodes and request.joined < self.step - 1)

    def _take_one(self, request: SimRequest) -> None:
        self._tables[request].append(self._new_block())

    def _extend(self, request: SimRequest, num_tokens: int) -> bool:
        table = self._tables[request]
        need = -(-(request.computed + num_tokens) // self._block_size) - len(table)
        if need > 0 and need > self.pool.capacity - self.pool.used:
            return False
        table.extend(self._new_block() for _ in range(need))
        self._keep(request, request.computed + num_tokens)
        return True

    def _begin(self, request: SimRequest, budget: int) -> int:
        total, size = request.prompt_tokens + request.generated, self._block_size
        self._trim()  # a shrink may have begun
        found = self._find(request, (total - 1) // size)
        num_woken = sum(not block.num_holders for block in found)
        if -(-total // size) - len(found) + num_woken > self.pool.capacity - self.pool.used:
            return 0
        for block in found:
            if not block.num_holders:
                del self._idle[block]
            block.num_holders += 1
        self.pool.used += num_woken
        request.computed = len(found) * size
        self.hit_tokens += request.computed
        self._tables[request] = found
        count = min(total - request.computed, budget)
        self._extend(request, count)
        return count
