"""How many layers a device's reserve holds: a level where there is room, few where KV has little."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kv_resize import FakePageAllocator, PagePool
from morphserve.residence import PagedResidence

GIB = 1 << 20  # a thousandth of it: these pages are real
PAGE_BYTES = 8 << 10
# A Llama-8B, of 32 layers: as loaded, in fp8, and what is no layer's.
LAYER_BYTES, FP8_BYTES, OTHER_BYTES = 416 << 10, 209 << 10, int(0.75 * GIB)


def residence_of(total_gib: float) -> PagedResidence:
    allocator = FakePageAllocator(1 << 14, PAGE_BYTES)
    pool = PagePool(allocator)
    pool.create(32 * LAYER_BYTES // PAGE_BYTES)
    pool.take(pool.num_free)
    unused: Any = None
    return PagedResidence(
        torch.device("cpu"), allocator, pool, unused, unused, lambda: None, unused, int(total_gib * GIB),
        lambda: OTHER_BYTES,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("total_gib", "memory_share", "num_layers"),
    [
        (79.2, 0.9, 8),  # a whole level of the default ladder
        (79.2, 0.28, 2),  # 8.4 GiB are left for KV and the rest
        (79.2, 0.35, 4),
        (22.5, 0.92, 2),
        (15.7, 0.95, 1),  # next to nothing is left, and one layer has to fit
    ],
)
def test_the_reserve_follows_what_weights_leave(total_gib: float, memory_share: float, num_layers: int) -> None:
    """Guards: a quarter of the KV cache kept empty for the sake of a few steps, where a model barely fits."""
    residence = residence_of(total_gib)
    sizes = {"base": [LAYER_BYTES] * 32, "fp8": [FP8_BYTES] * 32}
    reserved = residence.reserve(sizes, 1, 8, memory_share, None)
    assert reserved == num_layers * FP8_BYTES
    assert residence.pool.num_free == -(-reserved // PAGE_BYTES)


def test_a_number_that_is_given_stays() -> None:
    """Guards: a swap batch that somebody asked for, cut down."""
    sizes = {"base": [LAYER_BYTES] * 32, "fp8": [FP8_BYTES] * 32}
    assert residence_of(79.2).reserve(sizes, 5, 5, 0.28, None) == 5 * FP8_BYTES


def test_a_kv_size_that_is_given_is_the_room() -> None:
    """Guards: a reserve as large as half of a small KV cache, because the device is large."""
    sizes = {"base": [LAYER_BYTES] * 32, "fp8": [FP8_BYTES] * 32}
    assert residence_of(79.2).reserve(sizes, 1, 8, 0.9, 11 * GIB) == 3 * FP8_BYTES
