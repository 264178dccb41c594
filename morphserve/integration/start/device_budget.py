"""What CUDA graphs take of the memory for KV, a set a level where vLLM counts one; and so how many levels there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from morphserve.errors import ConfigError
from morphserve.residence import RESERVE_SHARE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.worker_base import WorkerBase

_FEWEST_LEVELS, _MOST_LEVELS = 4, 8  # of a format


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


def levels_of_a_format(vllm_config: VllmConfig) -> int:
    """Return into how many levels a format is cut on a GPU: so many that 3 % of it stage each whole, four to eight.

    A level more costs some 70 MiB of graphs and four seconds at start, and makes the reserve that stages a level
    smaller. Steps between the batches of a level that is not staged whole run graphs of pieces.
    """
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    heads = model.get_num_attention_heads(parallel) + model.get_num_kv_heads(parallel)
    hidden = model.get_hidden_size()
    inner = getattr(model.hf_text_config, "intermediate_size", None)
    if not isinstance(inner, int):  # a model that calls it otherwise, or has one for each layer
        inner = 4 * hidden
    # The widest default format has a byte a weight. A tenth more: scales, and whole pages.
    layer_bytes = 1.1 * hidden * (2 * heads * model.get_head_size() + 3 * inner // parallel.tensor_parallel_size)
    staged = max(int(RESERVE_SHARE * current_platform.get_device_total_memory() / layer_bytes), 1)
    num_layers = model.get_total_num_hidden_layers()
    return min(max(-(-num_layers // staged), _FEWEST_LEVELS), _MOST_LEVELS, num_layers)
