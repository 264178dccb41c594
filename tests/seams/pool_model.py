"""vLLM's block pool of one full-attention group, and what a resize makes of it, with lists and ids only.

The model does not share a line with what it checks. It says which ids an allocation gets, so one comparison per
operation shows a wrong free-queue order, and `compare` holds the rest against the real pool.
"""

from __future__ import annotations

from typing import Any

BLOCK = 4  # tokens per block
Prefix = bytes  # the tokens up to and with a position: what its KV depends on


class PoolModel:
    """Ids `1 .. published - 1`; block 0 is vLLM's null block."""

    def __init__(self, published: int, watermark: float) -> None:
        self.published = published
        self.watermark = watermark
        self.free = list(range(1, published))  # reused from the left
        self.refs: dict[int, int] = {}  # blocks in use
        self.hashes: dict[int, Prefix] = {}  # cached block -> what it holds
        self.cached: dict[Prefix, list[int]] = {}  # -> blocks, in the order they were cached
        self.tables: dict[str, list[int]] = {}
        self.held_back: list[list[int]] = []  # freed by the scheduler, not yet given to the pool
        self.limit: int | None = None
        self.tail: list[int] = []  # ids >= limit that are live or cached
        self.vacant: list[int] = []

    # ---- requests

    def allocate(self, name: str, num_tokens: int, hits: list[int], admission: bool) -> bool:
        """Slots for `num_tokens` tokens in all, of which `hits` are in the cache; False if there is no room."""
        table = self.tables.get(name, [])
        need = -(-num_tokens // BLOCK) - len(table) - len(hits)
        idle = [block for block in hits if block not in self.refs]
        reserve = int(self.watermark * self.published) if admission else 0
        if max(need, 0) + len(idle) + reserve > len(self.free):
            return False
        for block in hits:
            if block not in self.refs:
                self.free.remove(block)
            self.refs[block] = self.refs.get(block, 0) + 1
        fresh, self.free = self.free[: max(need, 0)], self.free[max(need, 0) :]
        for block in fresh:
            self.uncache(block)
            self.refs[block] = 1
        self.tables[name] = table + hits + fresh
        return True

    def cache(self, block: int, prefix: Prefix) -> None:
        self.hashes[block] = prefix
        self.cached.setdefault(prefix, []).append(block)

    def uncache(self, block: int) -> None:
        prefix = self.hashes.pop(block, None)
        if prefix is not None:
            self.cached[prefix].remove(block)
            if not self.cached[prefix]:
                del self.cached[prefix]

    def release(self, blocks: list[int]) -> None:
        """Give up one reference to each of a table's blocks, last block first."""
        empty, known = [], []
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                del self.refs[block]
                (known if block in self.hashes else empty).append(block)
        self.free = empty + self.free + known
        if self.limit is not None:
            self._fence(block for block in empty if block >= self.limit)
            self._balance()

    # ---- resizing

    def grow(self, published: int) -> None:
        self._offer(list(range(self.published, published)))
        self.published = published

    def begin_shrink(self, limit: int) -> None:
        self.limit = limit
        self.tail = list(range(limit, self.published))
        self._fence([block for block in self.tail if block not in self.refs and block not in self.hashes])
        self._balance()

    def advance_shrink(self, max_copies: int) -> list[tuple[int, int]]:
        self._balance()
        room = min(max_copies, len(self.vacant))
        moving, worthless = [], []
        for block in self.tail:
            if block not in self.refs and block not in self.hashes:
                worthless.append(block)
            elif len(moving) < room:
                moving.append(block)
            else:
                break
        copies = [(block, self.vacant.pop()) for block in moving]
        for source, destination in copies:
            self._rename(source, destination)
        self._fence(worthless)
        self._balance()
        return copies

    def finish_shrink(self) -> None:
        assert self.limit is not None and not self.tail and not self.vacant
        self.published, self.limit = self.limit, None

    def cancel_shrink(self) -> None:
        assert self.limit is not None
        fenced = set(range(self.limit, self.published)) - set(self.tail)
        back = sorted(self.vacant) + sorted(fenced)
        self.limit, self.tail, self.vacant = None, [], []
        self._offer(back)

    def _rename(self, source: int, destination: int) -> None:
        self.tail.remove(source)
        for blocks in (self.free, *self.tables.values(), *self.held_back):
            blocks[:] = [destination if block == source else block for block in blocks]
        if source in self.refs:
            self.refs[destination] = self.refs.pop(source)
        if (prefix := self.hashes.get(source)) is not None:
            self.uncache(source)
            self.cache(destination, prefix)

    def _fence(self, blocks: Any) -> None:
        for block in blocks:
            self.free.remove(block)
            self.tail.remove(block)

    def _balance(self) -> None:
        """One vacant block below for every tail block: taken from where vLLM would take next, or given back."""
        assert self.limit is not None
        short = len(self.tail) - len(self.vacant)
        if short < 0:
            self.free = [self.vacant.pop() for _ in range(-short)] + self.free
            return
        taken, self.free = self.free[:short], self.free[short:]
        for block in taken:
            self.uncache(block)
            if block < self.limit:
                self.vacant.append(block)
            else:
                self.tail.remove(block)

    def _offer(self, blocks: list[int]) -> None:
        """Behind the empty blocks that come first."""
        first = next((i for i, block in enumerate(self.free) if block in self.hashes), len(self.free))
        self.free[first:first] = blocks

    # ---- the comparison

    def compare(self, pool: Any, manager: Any) -> None:
        """Everything that vLLM knows of its blocks. AssertionError says what differs."""
        assert [b.block_id for b in pool.blocks] == list(range(self.published)), "ids are not positions"
        assert pool.blocks[0] is pool.null_block, "the null block has moved"
        queue = pool.free_block_queue.get_all_free_blocks()
        assert [b.block_id for b in queue] == self.free, "free queue"
        assert pool.get_num_free_blocks() == len(self.free), "number of free blocks"
        assert all(pool.blocks[b.block_id] is b for b in queue), "a block in the free queue that is not the pool's"
        refs = {b.block_id: b.ref_cnt for b in pool.blocks[1:] if b.ref_cnt}
        assert refs == self.refs, "reference counts"
        assert pool.num_gpu_blocks == 1 + len(self.free) + len(refs), "size that usage is computed from"
        tables = manager.coordinator.single_type_managers[0].req_to_blocks
        assert {name: [b.block_id for b in table] for name, table in tables.items() if table} == {
            name: table for name, table in self.tables.items() if table
        }, "block tables"
        hashes = {b.block_id: b.block_hash[:-4] for b in pool.blocks if b.block_hash is not None}
        assert hashes == self.hashes, "hashes"
        cached = {}
        for key, entry in pool.cached_block_hash_to_block._cache.items():
            blocks = entry if isinstance(entry, dict) else {entry.block_id: entry}
            by_id = all(b.block_id == i and pool.blocks[i] is b for i, b in blocks.items())
            assert by_id, "the prefix cache knows a block by an old id"
            cached[key[:-4]] = list(blocks)
        assert cached == self.cached, "prefix cache"
        assert not pool.cached_block_hashes_by_block
