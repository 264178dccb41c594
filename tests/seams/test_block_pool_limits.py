"""Which engines the block pool can serve, and how many blocks one request needs in them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from seams.pool_harness import BLOCK, FLOOR, full_attention, kv_config, vllm_config
from vllm.v1.kv_cache_interface import MambaSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs

from morphserve.errors import ConfigError
from morphserve.integration.engine.resizable import blocks_of_one_request, check_supported

MAMBA = MambaSpec(block_size=BLOCK, shapes=((1, 1),), dtypes=(torch.float32,))


def sliding(window: int) -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=window)


def of_one_type(*specs: Any) -> UniformTypeKVCacheSpecs:
    return UniformTypeKVCacheSpecs(block_size=BLOCK, kv_cache_specs={f"layer{i}": spec for i, spec in enumerate(specs)})


def test_the_floor_counts_every_group() -> None:
    """Guards against a pool in which the longest request waits for ever: each group holds blocks of its own."""
    config = vllm_config(max_in_flight_tokens=8)
    assert blocks_of_one_request(config, kv_config(full_attention())) == FLOOR
    assert blocks_of_one_request(config, kv_config(full_attention(), sliding(1000))) == 2 * FLOOR - 1
    # A window of 5 tokens, of which the last is new, 8 in flight: 12 tokens, from the middle of a block.
    assert blocks_of_one_request(config, kv_config(full_attention(), sliding(5))) == FLOOR + 4


@pytest.mark.parametrize(
    ("config", "kv_cache", "message"),
    [
        ({}, kv_config(), "of kind none"),
        ({}, kv_config(full_attention(), MAMBA), "of kind .*MambaSpec"),
        ({"kv_transfer_config": SimpleNamespace(kv_connector="Nixl")}, None, "--kv-transfer-config"),
        (
            {"parallel_config": SimpleNamespace(decode_context_parallel_size=2, prefill_context_parallel_size=1)},
            None,
            "decode_context_parallel_size is 2",
        ),
        (
            {"parallel_config": SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=2)},
            None,
            "prefill_context_parallel_size is 2",
        ),
        ({}, kv_config(of_one_type(full_attention(), MAMBA)), "of kind .*MambaSpec"),
    ],
)
def test_unsupported_engines_are_refused(config: dict[str, Any], kv_cache: Any, message: str) -> None:
    """Guards against starting on a model or set-up whose KV the pool would corrupt."""
    with pytest.raises(ConfigError, match=message):
        check_supported(vllm_config(**config), kv_cache or kv_config(full_attention()))


def test_layers_of_one_type_are_looked_into() -> None:
    """Guards against a model whose layers differ in their heads alone, refused for the name of their group."""
    check_supported(vllm_config(), kv_config(of_one_type(full_attention(), full_attention(num_kv_heads=2))))
