"""Which KV caches of vLLM's can grow and shrink, and below how many blocks none may go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec, UniformTypeKVCacheSpecs

from morphserve.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

_KINDS = (FullAttentionSpec, SlidingWindowSpec)  # by their names: a kind derived from one may be something else


def check_supported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse engines whose KV blocks cannot be renamed or whose tail cannot be given back.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        kv_cache_config: The workers' or the scheduler's KV cache configuration.

    Raises:
        ConfigError: Names the setting, what is supported and what to change.
    """
    _check_groups(kv_cache_config)
    if vllm_config.kv_transfer_config is not None:
        raise ConfigError(
            f"KV connector {vllm_config.kv_transfer_config.kv_connector!r} is configured: it may read or "
            "write blocks between steps, so they cannot be moved. Remove --kv-transfer-config."
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name)) != 1:
            raise ConfigError(f"{name} is {size}, only 1 is supported. Leave it at 1.")


def _check_groups(kv_cache_config: KVCacheConfig) -> None:
    kinds = {type(spec).__name__ for group in kv_cache_config.kv_cache_groups for spec in _members(group.kv_cache_spec)}
    known = {kind.__name__ for kind in _KINDS}
    if not kinds or kinds - known:
        raise ConfigError(
            f"the KV cache is of kind {', '.join(sorted(kinds)) or 'none'}, supported are {', '.join(sorted(known))}: "
            "of other kinds a block is not all there is to move. Run this model without --plugin morphserve."
        )


def _members(spec: KVCacheSpec) -> Iterable[Any]:
    return spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else (spec,)


def blocks_of_one_request(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Blocks that the longest request may hold at once, over all KV cache groups, and the null block.

    Below this a request of max_model_len never runs. Groups share one pool: a sliding window needs its own blocks.
    """
    longest = vllm_config.model_config.max_model_len
    needed = 1
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        blocks = -(-longest // spec.block_size)
        if isinstance(spec, SlidingWindowSpec):
            blocks = min(blocks, -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes))
        needed += blocks
    return needed
