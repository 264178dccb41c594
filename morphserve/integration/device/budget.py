"""What CUDA graphs take of the memory for KV: there is a bank a level, and vLLM counts one."""

from __future__ import annotations

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
