"""T4: pages that go from weights to KV blocks and back, at random, many times; every byte is checked on the way."""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from kv_resize import ArenaBacking, ElasticCache, KVGeometry, PagePool
from morphserve.residence import CudaCopier, HostCopier, WeightArena
from morphserve.tools.gpucheck.bench import Bench, OutOfTime
from morphserve.tools.gpucheck.device import open_page_allocator, require_device, synchronize
from quant_layers import BASE, Part

_SEED = 20
_LEAST = (20, 3)  # rounds, for real and dry
_MOST_S = 20.0  # for rounds that need not be; the rest is for those that must, on a host that is full


def run(bench: Bench) -> None:
    """See the module."""
    require_device(bench)
    layers, pages_each = bench.pick((12, 16), (4, 2))
    spare = pages_each
    num_pages = layers * pages_each + spare
    with open_page_allocator(bench, num_pages) as allocator:
        world = _World(bench, allocator, layers, pages_each, spare)
        rounds = world.play(bench)
        bench.note(f"{rounds} rounds, {world.num_checks} comparisons, seed {_SEED}")
        bench.require(f"at least {bench.pick(*_LEAST)} rounds", rounds >= bench.pick(*_LEAST), f"{rounds}")
        bench.require("every byte of layers and KV was right", not world.wrong, "; ".join(world.wrong[:3]))
        world.close()
        bench.require("every page is back in the pool", world.pool.num_free == num_pages, f"{world.pool.num_free}")


class _World:
    """Layers in the product's weight arena, a KV cache that grows into the pages of those that are out, one pool."""

    def __init__(self, bench: Bench, allocator: Any, layers: int, pages_each: int, spare: int) -> None:
        self._device = bench.device
        self._random = random.Random(_SEED)
        self.pool = PagePool(allocator, layers * pages_each + spare)
        page = self.pool.allocator.granularity_bytes
        # Full and empty pages must differ, and so must any two layers: random bytes.
        generator = torch.Generator().manual_seed(_SEED)
        self._arena = WeightArena(self.pool, CudaCopier(bench.device) if bench.device == "cuda" else HostCopier())
        self._masters: list[torch.Tensor] = []
        for layer in range(layers):
            master = torch.empty(pages_each * page, dtype=torch.uint8).random_(0, 256, generator=generator)
            self._arena.add(_part(layer), {"mlp": {"weight": master}})
            self._masters.append(master)
        self._inside: set[int] = set()
        self._spare = spare
        blocks_per_page = 4
        geometry = KVGeometry.layer_outermost(
            2, page // blocks_per_page, (layers * pages_each + spare) // 2 * blocks_per_page, page
        )
        self._blocks_per_page_pair = blocks_per_page  # so many blocks more take one page in each of the two layers
        for layer in range(layers):
            self._bring(layer)
        self._kv = ElasticCache(ArenaBacking(self.pool, geometry.size_bytes), geometry, blocks_per_page)
        self._content = dict.fromkeys(range(blocks_per_page), 0)
        self.wrong: list[str] = []
        self.num_checks = 0

    def play(self, bench: Bench) -> int:
        """Make rounds; each takes layers out, uses their pages for KV, and back again.

        Raises:
            OutOfTime: not even those that must be are done.
        """
        times: list[float] = []
        rounds, until_s = 0, max(bench.left_s - _MOST_S, 0.25 * bench.budget_s)
        while rounds < bench.pick(*_LEAST) or (bench.left_s > until_s and rounds < bench.pick(2000, 3)):
            if bench.left_s <= 0:
                if times:
                    bench.figure("a round, checks included", "ms", times)
                raise OutOfTime(f"{rounds} rounds of {bench.pick(*_LEAST)} are done.")
            start = time.perf_counter()
            self._one_round(rounds)
            synchronize(self._device)
            times.append((time.perf_counter() - start) * 1e3)
            rounds += 1
            if len(self.wrong) > 10:
                break
        bench.figure("a round, checks included", "ms", times)
        return rounds

    def close(self) -> None:
        """Give all pages back."""
        synchronize(self._device)
        self._kv.backing.release([(0, -(-self._kv.backing.size_bytes // self._page) * self._page)])
        for layer in sorted(self._inside):
            self._arena.unload([_part(layer)])

    @property
    def _page(self) -> int:
        return self.pool.allocator.granularity_bytes

    def _one_round(self, number: int) -> None:
        out = self._random.sample(sorted(self._inside), self._random.randint(1, len(self._inside)))
        for layer in out:
            self._arena.unload([_part(layer)])
            self._inside.discard(layer)
        grown = self._kv.num_mapped + self.pool.num_free // 2 * self._blocks_per_page_pair
        self._kv.map(min(grown, self._kv.max_num_blocks))
        self._content |= dict.fromkeys(range(len(self._content), self._kv.num_mapped), 0)
        self._check_kv(f"round {number}, grown")
        self._fill_kv(number)
        self._check_layers(f"round {number}, beside a grown KV")
        self._check_kv(f"round {number}, written")
        self._kv.unmap(self._blocks_per_page_pair)
        self._content = {block: value for block, value in self._content.items() if block < self._kv.num_mapped}
        self._random.shuffle(out)
        for layer in out:
            self._bring(layer)
        self._check_kv(f"round {number}, shrunk")
        self._check_layers(f"round {number}, restored")

    def _bring(self, layer: int) -> None:
        self._arena.load([_part(layer)])
        self._inside.add(layer)

    def _bytes_of(self, layer: int) -> torch.Tensor:
        return self._arena.tensors(_part(layer))["mlp"]["weight"]

    def _fill_kv(self, number: int) -> None:
        for block in self._content:
            self._content[block] = (number * 31 + block) % 120 + 1
            for start, end in self._kv.geometry.byte_ranges(block, block + 1):
                self._kv.buffer[start:end].fill_(self._content[block])

    def _check_kv(self, when: str) -> None:
        for block, value in self._content.items():
            for start, end in self._kv.geometry.byte_ranges(block, block + 1):
                self._check(bool((self._kv.buffer[start:end] == value).all()), f"{when}: KV block {block}")

    def _check_layers(self, when: str) -> None:
        for layer in self._inside:
            master = self._masters[layer].to(self._device)
            self._check(torch.equal(self._bytes_of(layer), master), f"{when}: layer {layer}")

    def _check(self, ok: bool, what: str) -> None:
        self.num_checks += 1
        if not ok:
            self.wrong.append(what)


def _part(layer: int) -> Part:
    return Part(layer, "mlp", BASE)
