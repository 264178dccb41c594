"""The capacity that an engine starts with: level 0's blocks, and what growth must leave free for ever after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from morphserve.control import Plan
from morphserve.errors import ConfigError
from morphserve.integration.engine.block_pool import VllmBlockPool


def publish_base(pool: VllmBlockPool, collective_rpc: Callable[..., Any], num_kv_blocks: int) -> int:
    """Give the scheduler level 0's blocks, mapped, of a cache that is laid out for the deepest level.

    Returns:
        Bytes that a worst-case forward pass takes, of all ranks together: no rank maps a block that needs them.

    Raises:
        ConfigError: a rank could not map that much.
    """
    if num_kv_blocks < pool.num_kv_blocks:
        pool.begin_shrink(num_kv_blocks)
        pool.advance_shrink(0)
        pool.finish_shrink()
    worst = collective_rpc("morphserve_worst_forward", args=(False,))
    if None in worst:  # a forward pass is all ranks' together
        worst = collective_rpc("morphserve_worst_forward", args=(True,))
    collective_rpc("morphserve_keep_free", args=(sum(worst), len(worst)))
    plan = Plan(revision=0, layer_formats=(), num_kv_blocks=num_kv_blocks)
    replies = collective_rpc("morphserve_commit", args=(plan,))
    short = [r for r in replies if not r.ok or r.num_kv_blocks < num_kv_blocks]
    if short:
        raise ConfigError(
            f"rank {short[0].rank} could not map {num_kv_blocks} KV blocks: {short[0].error or 'out of memory'}. "
            "Lower VLLM_CPU_KVCACHE_SPACE (on a GPU --gpu-memory-utilization) or --num-gpu-blocks-override."
        )
    return sum(worst)
