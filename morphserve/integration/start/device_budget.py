"""What CUDA graphs take of the memory for KV: there is a bank a level, and vLLM counts one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from morphserve.errors import ConfigError


def check_fixed_kv(worker: Any, num_banks: int) -> None:
    """A KV size that is given skips the measurement that the banks come off: see that they fit beside it.

    After vLLM's own profiling forward pass, whose memory torch still holds: what is free is free.

    Args:
        worker: vLLM's.
        num_banks: of CUDA graphs on this rank.

    Raises:
        ConfigError: the KV size, what all banks take, what is free, and the KV size that would do.
    """
    fixed = worker.cache_config.kv_cache_memory_bytes
    if not fixed or num_banks < 2:  # one bank: as in vLLM, the user's business
        return
    free, _ = torch.cuda.mem_get_info()
    graphs = int(worker.model_runner.profile_cudagraph_memory())  # of all banks, see worker.py
    if graphs and fixed + graphs > free:
        raise ConfigError(
            f"kv_cache_memory_bytes: {fixed:,} B, and CUDA graphs of {num_banks} levels take some {graphs:,} B: more "
            f"than the {free:,} B that are free. Give at most {max(free - graphs, 0):,} B, fewer ladder.steps, or "
            "leave --kv-cache-memory-bytes out: then it is measured."
        )


def check_given_blocks(given: int | None, kv_cache_configs: Sequence[Any], available: Sequence[int]) -> None:
    """A number of blocks that is given is laid out whatever memory says: see that every rank has it.

    Args:
        given: num_gpu_blocks_override; None = vLLM counts what fits.
        kv_cache_configs: of each rank, for that number.
        available: bytes for KV on each rank, those of all banks taken off.

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
