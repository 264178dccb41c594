"""Which cached KV a request may reuse, by the levels that wrote it.

vLLM's block hashes cover tokens, not the weights that computed the KV. So each cached block remembers its *span*: the
best and the deepest level that anything in it depends on, which are those of all tokens before it too. A request has
the span of its context: the levels its tokens were computed at, and those of the blocks it took from the cache.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock, make_block_hash_with_group_id

from morphserve.integration import seams

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.morphserve")

PrefixReuse = Literal["any", "not_worse", "exact"]
_SWEPT_PER_STEP = 64  # remembered blocks, at level 0: 0.1 ms of a step
_LOOKED_AT = 2  # remembered blocks for each new one: so there are never many stale ones


class Span(NamedTuple):
    """Levels that KV depends on: all lie between these two."""

    best: int
    deepest: int

    def with_level(self, level: int) -> Span:
        """Also of KV written at `level`."""
        return Span(min(self.best, level), max(self.deepest, level))

    def joined(self, other: Span) -> Span:
        """Return what both depend on."""
        return Span(min(self.best, other.best), max(self.deepest, other.deepest))


CLEAN = Span(0, 0)


class Provenance:
    """What the blocks and requests of one block pool depend on, and who may reuse what.

    A request at level k may reuse a cached block, by `rule`:

    * `any`: always;
    * `not_worse`: if nothing in it comes from a level deeper than k. At level 0 blocks of other levels are dropped
      from the cache, a few in each step, so that they do not keep room that clean ones could use;
    * `exact`: if everything in it comes from level k.

    A request that demands full precision reuses level 0's blocks only, whatever the rule.

    Between two `schedule()` calls the scheduler hook says `set_level` before the first step at another level, `sweep`,
    and `forget` when a request ends. The rest is seen by call-through wrappers on this pool and its manager.
    Cost: O(1) per call of vLLM's that is wrapped, a few comparisons when nothing degraded is left.

    An error of ours stays inside, and nobody knows then which level wrote a block: from then on no block is reused by
    anybody, whatever the rule, and `on_error` is called, once. vLLM's own calls and errors pass as they are.
    """

    def __init__(self, manager: KVCacheManager, rule: PrefixReuse = "not_worse") -> None:
        """Wrap, on these objects only, how vLLM looks into the prefix cache, adds to it, and gives out slots."""
        self.rule: PrefixReuse = rule
        self._manager = manager
        self._pool = manager.block_pool
        self._level = 0
        self._spans: dict[str, Span] = {}  # request id |-> span; absent = clean
        self._found: dict[str, tuple[KVCacheBlock, ...]] = {}  # request id |-> what its last lookup found
        self._reused: dict[str, dict[int, int]] = {}  # request id |-> deepest level |-> degraded blocks it has taken
        self._demanding: set[str] = set()  # request ids that take level 0's blocks only
        # By identity: a block may be renamed meanwhile, and KVCacheBlock is not hashable. Absent = clean.
        self._written: OrderedDict[int, tuple[KVCacheBlock, Span]] = OrderedDict()
        self._asking: str | None = None  # the request whose lookup is under way
        self.failed = False
        self.on_error: Callable[[], None] = lambda: None
        for row, owner, wrapper in (
            (seams.POOL_CACHE, self._pool, self._cache_full_blocks),
            (seams.POOL_CACHE_PARTIAL, self._pool, self._cache_partial_block),
            (seams.POOL_HIT, self._pool, self._get_cached_block),
            (seams.MANAGER_HIT, manager, self._get_computed_blocks),
            (seams.MANAGER_SLOTS, manager, self._allocate_slots),
        ):
            seams.wrap(row, partial(partial, wrapper), on=owner)  # the wrapper's first argument is the original

    def span(self, request_id: str) -> Span:
        """Return the levels that a live request's context depends on."""
        return self._spans.get(request_id, CLEAN)

    def block_span(self, block: KVCacheBlock) -> Span:
        """Return the levels that a cached block depends on."""
        known = self._written.get(id(block))
        return CLEAN if known is None else known[1]

    def reused(self, request_id: str) -> dict[int, int]:
        """Degraded blocks that a live request took from the cache, by their deepest level."""
        return self._reused.get(request_id, {})

    def demand_full_precision(self, request_id: str) -> None:
        """Let this request reuse only what level 0 wrote. Call it before its first lookup."""
        self._demanding.add(request_id)

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended. Unknown ids are fine."""
        self._spans.pop(request_id, None)
        self._found.pop(request_id, None)
        self._reused.pop(request_id, None)
        self._demanding.discard(request_id)

    def _guard(self, call: Callable[..., None], *args: Any) -> None:
        if self.failed:
            return
        try:
            call(*args)
        except Exception:
            self._fail()

    def _fail(self) -> None:
        """Say that nothing is reused any more. With the error under way."""
        self.failed = True
        logger.exception(
            "morphserve: which level wrote the blocks of the prefix cache was lost to an error, so no prefix is reused "
            "any more. Restart the server to have prefixes reused again."
        )
        self.on_error()

    def set_level(self, level: int) -> None:
        """Set the level of the next step."""
        self._guard(self._set_level, level)

    def _set_level(self, level: int) -> None:
        self._level = level

    def sweep(self) -> None:
        """Drop a few blocks that nobody may reuse any more from the cache. Call it once a step."""
        self._guard(self._sweep)

    def _sweep(self) -> None:
        if self._level > 0 or self.rule != "not_worse":
            return
        for _ in range(min(len(self._written), _SWEPT_PER_STEP)):
            _, (block, _) = self._written.popitem(last=False)
            # Without a hash it was evicted, perhaps fenced and forgotten: its id may be another's now.
            if block.block_hash is not None:
                self._pool._maybe_evict_cached_block(block)

    # ---- looking into the cache ----

    def _admits(self, request_id: str, block: KVCacheBlock) -> bool:
        span = self.block_span(block)
        if request_id in self._demanding:
            return span == CLEAN
        if self.rule == "any":
            return True
        if self.rule == "not_worse":
            return span.deepest <= self._level
        return span == Span(self._level, self._level)

    def _get_computed_blocks(self, original: Callable[..., Any], request: Request, *args: Any, **kwargs: Any) -> Any:
        self._asking = request.request_id
        try:
            result = original(request, *args, **kwargs)
        finally:
            self._asking = None
        self._guard(self._note_found, request, result)
        return result

    def _note_found(self, request: Request, result: Any) -> None:
        self._found.pop(request.request_id, None)
        degraded = self._written or self._level > 0
        if degraded and (hits := tuple(block for group in result[0].blocks for block in group)):
            self._found[request.request_id] = hits

    def _get_cached_block(
        self, original: Callable[..., Any], block_hash: BlockHash, group_ids: list[int]
    ) -> list[KVCacheBlock] | None:
        blocks: list[KVCacheBlock] | None = original(block_hash, group_ids)
        if blocks is None or self.failed:
            return None
        try:
            return self._admitted(blocks, block_hash, group_ids)
        except Exception:
            self._fail()
            return None

    def _admitted(
        self, blocks: list[KVCacheBlock], block_hash: BlockHash, group_ids: list[int]
    ) -> list[KVCacheBlock] | None:
        asking = self._asking
        if asking is None or (self._level == 0 and not self._written):
            return blocks
        admitted = []
        for block, group_id in zip(blocks, group_ids, strict=True):
            # The same tokens may be cached more than once, written at different levels.
            same = (block, *self._duplicates(make_block_hash_with_group_id(block_hash, group_id)))
            fit = next((b for b in same if self._admits(asking, b)), None)
            if fit is None:
                return None
            admitted.append(fit)
        return admitted

    def _duplicates(self, key: BlockHashWithGroupId) -> Iterable[KVCacheBlock]:
        entry = self._pool.cached_block_hash_to_block._cache.get(key)
        return entry.values() if isinstance(entry, dict) else ()

    # ---- what is computed, and put into the cache ----

    def _allocate_slots(self, original: Callable[..., Any], request: Request, *args: Any, **kwargs: Any) -> Any:
        """Slots given out now are written in the next step, at its level."""
        if self._level == 0 and not self._spans and not self._found and not self._reused:
            return original(request, *args, **kwargs)
        before = self._spans.get(request.request_id)
        self._guard(self._begin_slots, request, before)
        result = original(request, *args, **kwargs)
        self._guard(self._end_slots, request, before, result)
        return result

    def _begin_slots(self, request: Request, before: Span | None) -> None:
        request_id = request.request_id
        if request.num_computed_tokens == 0:  # new, or preempted and starting over
            span = Span(self._level, self._level)
            for block in self._found.get(request_id, ()):
                span = span.joined(self.block_span(block))
        else:
            span = (before or CLEAN).with_level(self._level)
        self._put(request_id, span)

    def _end_slots(self, request: Request, before: Span | None, result: Any) -> None:
        if result is None:
            self._put(request.request_id, before or CLEAN)
        elif request.num_computed_tokens == 0:
            self._took(request.request_id, self._found.pop(request.request_id, ()))

    def _took(self, request_id: str, hits: tuple[KVCacheBlock, ...]) -> None:
        self._reused.pop(request_id, None)
        if levels := [span.deepest for span in map(self.block_span, hits) if span != CLEAN]:
            self._reused[request_id] = {level: levels.count(level) for level in set(levels)}

    def _put(self, request_id: str, span: Span) -> None:
        if span == CLEAN:
            self._spans.pop(request_id, None)
        else:
            self._spans[request_id] = span

    def _may_cache(self, request_id: str) -> bool:
        """Return whether what this request computes now is of use to anybody who comes at this level."""
        return not self.failed and (self._level > 0 or self.rule != "not_worse" or request_id not in self._spans)

    def _remember(self, block: KVCacheBlock, span: Span) -> None:
        if block.block_hash is None:
            return
        if span == CLEAN:
            self._written.pop(id(block), None)  # it was another level's, was evicted, and is new now
            return
        self._written[id(block)] = (block, span)
        for _ in range(_LOOKED_AT):
            self._look_at_oldest()

    def _look_at_oldest(self) -> None:
        """Forget the block that was not looked at for longest, if it has lost its hash."""
        key, known = self._written.popitem(last=False)
        if known[0].block_hash is not None:
            self._written[key] = known

    def _cache_full_blocks(
        self,
        original: Callable[..., Any],
        request: Request,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if not self._may_cache(request.request_id):
            return  # the caller counts these blocks as cached and does not come back to them
        original(request, blocks, num_cached_blocks, num_full_blocks, *args, **kwargs)
        self._guard(self._remember_all, request, blocks, num_cached_blocks, num_full_blocks)

    def _remember_all(self, request: Request, blocks: list[KVCacheBlock], start: int, end: int) -> None:
        span = self.span(request.request_id)
        if span != CLEAN or self._written:
            for block in blocks[start:end]:
                self._remember(block, span)

    def _cache_partial_block(
        self, original: Callable[..., Any], request: Request, block: KVCacheBlock, *args: Any, **kwargs: Any
    ) -> BlockHashWithGroupId | None:
        if not self._may_cache(request.request_id):
            return None
        key: BlockHashWithGroupId | None = original(request, block, *args, **kwargs)
        self._guard(lambda: self._remember(block, self.span(request.request_id)))
        return key
