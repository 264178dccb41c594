"""A layout of KV caches that tests make from numbers, as vLLM makes it from the strides of its tensors."""

from __future__ import annotations

from kv_resize import KVGeometry, Placement


def block_outermost(
    num_layers: int, block_bytes_per_layer: int, max_num_blocks: int, page_bytes: int
) -> KVGeometry:
    """All layers of a block side by side (BLHNC, BLNHC, BHLNC)."""
    stride = block_bytes_per_layer * num_layers
    layers = Placement(num_layers, layer_stride=block_bytes_per_layer, block_stride=stride)
    return KVGeometry.from_placements([layers], max_num_blocks, stride * max_num_blocks, page_bytes)
