"""What CUDA graphs take of the memory for KV, a set a level where vLLM counts one; and so how many levels there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from morphserve.errors import ConfigError

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase

_LEVELS = 4  # of a format


def check_fixed_kv(worker: WorkerBase, num_graph_sets: int) -> None:
    """Refuse a KV size beside which the graph sets do not fit: given, it skips the measurement they come off.

    After vLLM's own profiling forward pass, whose memory torch still holds: what is free is free.

    Args:
        worker: vLLM's.
        num_graph_sets: of CUDA graphs on this rank.

    Raises:
        ConfigError: the KV size, what all graph sets take, what is free, and the KV size that would do.
    """
    fixed = worker.cache_config.kv_cache_memory_bytes
    if not fixed or num_graph_sets < 2:  # one graph set: as in vLLM, the user's business
        return
    free, _ = torch.cuda.mem_get_info()
    graphs = int(worker.model_runner.profile_cudagraph_memory())  # of all graph sets, see worker/cuda/hooks.py
    if graphs and fixed + graphs > free:
        raise ConfigError(
            f"kv_cache_memory_bytes: {fixed:,} B, and CUDA graphs of {num_graph_sets} levels take some {graphs:,} B: "
            f"more than the {free:,} B that are free. Give at most {max(free - graphs, 0):,} B, fewer ladder.steps, or "
            "leave --kv-cache-memory-bytes out: then it is measured."
        )


def check_given_blocks(given: int | None, kv_cache_configs: Sequence[Any], available: Sequence[int]) -> None:
    """Refuse a number of blocks that some rank has no memory for: given, it is laid out whatever memory says.

    Args:
        given: num_gpu_blocks_override; None = vLLM counts what fits.
        kv_cache_configs: of each rank, for that number.
        available: bytes for KV on each rank, those of all graph sets taken off.

    Raises:
        ConfigError: the number, what it takes, what there is, and the number that would do.
    """
    if given is None:
        return
    for config, free in zip(kv_cache_configs, available, strict=True):
        needed = sum(tensor.size for tensor in config.kv_cache_tensors)
        if needed > free:
            fitting = max(free, 0) * config.num_blocks // needed
            raise ConfigError(
                f"num_gpu_blocks_override: {given:,} blocks take {needed:,} B, and {free:,} B are left beside weights "
                f"and the CUDA graphs of all levels. Give at most {fitting:,}, or leave --num-gpu-blocks-override out."
            )


def levels_of_a_format(num_layers: int) -> int:
    """Return into how many levels a format is cut on a GPU.

    Each has CUDA graphs, for which as much is kept of the KV budget until they are captured as vLLM's own take. Steps
    between the batches of a level that the reserve does not hold whole run graphs of pieces.
    """
    return min(_LEVELS, num_layers)
