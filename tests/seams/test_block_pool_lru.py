"""Prefix-cache hits before, during and after a shrink and a grow, against an LRU of the size at that moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from seams.pool_lru import LruOfBlocks, RealCache, Tokens, hits_by_phase, recent_prompts, zipf_prompts

Load = Callable[[int], Iterator[Tokens]]

REQUESTS, RUNNING, FULL = 1000, 8, 160


@pytest.mark.parametrize("load", [zipf_prompts, recent_prompts])
@pytest.mark.parametrize("copies", [1, 16])
@pytest.mark.parametrize("small", [100, 60, 40])
def test_hits_are_those_of_an_lru_of_that_size(load: Load, small: int, copies: int) -> None:
    """Guards against a shrink that evicts hot prefixes because of where they lie, and a grow that costs cached ones.

    With 40 blocks, less is free than the shrink gives up: it takes what requests that end give back.
    """
    sizes = [FULL, small, FULL]
    real = RealCache(FULL, copies)
    found = hits_by_phase(real, load(small), sizes, REQUESTS, RUNNING)
    assert found == hits_by_phase(LruOfBlocks(FULL), load(small), sizes, REQUESTS, RUNNING)
    assert 0 < real.num_copied <= FULL - small, "more copies than blocks given up"


def test_the_load_tells_an_lru_from_a_cache_that_loses_its_newest() -> None:
    """Guards against a comparison that any shrink would pass: the requests right after it hit less."""
    hits = [0, 0]
    for seed in range(8):
        for number, pay in enumerate((LruOfBlocks._pay, _lose_the_newest)):
            cache = LruOfBlocks(FULL)
            cache._pay = partial(pay, cache)  # type: ignore[method-assign]
            hits[number] += hits_by_phase(cache, recent_prompts(seed), [*[FULL] * 10, 80], 10, RUNNING)[-1]
    assert hits[1] < 0.9 * hits[0]


def _lose_the_newest(cache: LruOfBlocks) -> None:
    cache.free.reverse()
    LruOfBlocks._pay(cache)
    cache.free.reverse()
