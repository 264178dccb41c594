"""kv_resize's idea of vLLM's KV layouts against the views vLLM itself makes."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheTensor,
    compute_layout_strides,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from kv_resize import ElasticCache, HostBacking, KVGeometry, Placement

LAYERS, BLOCKS = 4, 24


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC, KVCacheLayout.BLHNC])
def test_blocks_are_where_vllm_puts_them(layout: KVCacheLayout) -> None:
    """Guards against moving, zeroing or releasing other bytes than the ones attention reads."""
    spec = FullAttentionSpec(block_size=32, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    assert spec.page_size_bytes == 24_576
    layer_stride, block_stride, *_ = compute_layout_strides(spec, BLOCKS, LAYERS, layout)
    size = LAYERS * BLOCKS * spec.page_size_bytes
    names = [f"layer{i}" for i in range(LAYERS)]
    tensor = KVCacheTensor(size=size, layers=names, layer_stride=layer_stride, block_stride=block_stride)

    backing = HostBacking(size)
    placement = Placement(LAYERS, tensor.layer_stride, tensor.block_stride, tensor.offset)
    geometry = KVGeometry.from_placements([placement], BLOCKS, size, backing.page_bytes)
    cache = ElasticCache(backing, geometry, BLOCKS)
    assert cache.block_bytes == LAYERS * spec.page_size_bytes

    views = create_kv_cache_views(cache.buffer, spec, BLOCKS, layout, tensor)  # each [B, H, N, C]
    for layer, view in enumerate(views):
        for block in range(BLOCKS):  # small whole numbers, exact in bf16
            view[block] = 30 * layer + block
    cache.copy([(23, 1), (20, 2)])
    cache.unmap(20)
    cache.map(22)
    expected = [0, 23, 20, *range(3, 20), 0, 0]
    for layer, view in enumerate(views):
        values = [30 * layer + block for block in expected[:20]] + [0, 0]
        assert torch.equal(view[:22].amax((1, 2, 3)).float(), torch.tensor(values).float())
        assert torch.equal(view[:22].amin((1, 2, 3)).float(), torch.tensor(values).float())
