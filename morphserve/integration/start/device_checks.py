"""Refusals of an engine on a device, made before weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from morphserve.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM's custom all-reduce keeps 8 MiB for what it registers, 128 bytes for each call in each graph
# (vllm/distributed/device_communicators/custom_all_reduce.py, rank_data; same in 0.32 and 0.33).
_ALL_REDUCE_BUFFERS = 65_536
_STARTUP_PLAN = "VLLM_ENABLE_STARTUP_PLAN"
_ESTIMATE = "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS"


def check_device(vllm_config: VllmConfig) -> None:
    """Refuse what gives memory away behind our back, or was not made to follow blocks and layers.

    Raises:
        ConfigError: what it is, and which option to leave out.
    """
    v = vllm_config
    parallel, offload = v.parallel_config, v.offload_config
    for bad, what, remedy in (
        (
            offload.offload_backend != "auto"
            or offload.uva.cpu_offload_gb > 0
            or offload.prefetch.offload_group_size > 0,
            "vLLM's own weight offloading moves the same weights",
            "--cpu-offload-gb, --offload-group-size and --offload-backend",
        ),
        (
            v.model_config.enable_cumem_allocator,
            "vLLM's own allocator maps the pages of weights and KV",
            "--enable-cumem-allocator",
        ),
        (
            max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
            "context parallel spreads the tokens of a block over ranks",
            "--decode-context-parallel-size and --prefill-context-parallel-size",
        ),
        (
            v.attention_config.hisparse_config is not None,
            "HiSparse allocates a KV cache of its own",
            "its attention configuration",
        ),
        (
            v.speculative_config is not None,
            "speculative decoding on a GPU is not proven",
            "--speculative-config",
        ),
        (
            v.compilation_config.use_inductor_graph_partition,
            "Inductor's graph partition gives up the memory of earlier captures",
            "use_inductor_graph_partition of --compilation-config",
        ),
        (parallel.use_ubatching, "microbatches keep graphs of their own", "--enable-dbo"),
        (
            os.environ.get(_STARTUP_PLAN, "0").strip() not in ("", "0"),
            "a KV size that vLLM kept from another start is of another ladder's CUDA graphs",
            f"{_STARTUP_PLAN}={os.environ.get(_STARTUP_PLAN)}",
        ),
        (
            os.environ.get(_ESTIMATE, "1").strip().lower() in ("0", "false"),
            "the CUDA graphs of all levels would not be taken off the memory for KV",
            f"{_ESTIMATE}={os.environ.get(_ESTIMATE)}",
        ),
        (v.lora_config is not None, "LoRA on a GPU is not proven", "--enable-lora"),
        (
            v.model_config.quantization is not None,
            f"level 0 is quantized ({v.model_config.quantization}), on a GPU it must be bf16 or fp16",
            "--quantization, and serve a checkpoint in bf16 or fp16",
        ),
    ):
        if bad:
            raise ConfigError(f"not supported together with MorphServe on a GPU: {what}. Leave out {remedy}.")


def check_graph_buffers(vllm_config: VllmConfig, levels: Sequence[tuple[str, ...]]) -> None:
    """Refuse more sets of CUDA graphs than vLLM's custom all-reduce has room for; it would stop in mid-capture.

    Args:
        levels: formats of each, by decoder layer id.

    Raises:
        ConfigError: how many there are, how many there may be, and what makes them fewer.
    """
    from vllm.distributed.utils import get_pp_indices

    parallel = vllm_config.parallel_config
    num_graphs = _graphs_of_a_set(vllm_config)
    if parallel.tensor_parallel_size == 1 or parallel.disable_custom_all_reduce or not num_graphs:
        return
    stages = parallel.pipeline_parallel_size
    for stage in range(stages):
        start, end = get_pp_indices(len(levels[0]), stage, stages)
        num_graph_sets = len({level[start:end] for level in levels})
        of_a_set = num_graphs * (2 * (end - start) + 1)  # behind attention, MLP and embedding
        most = _ALL_REDUCE_BUFFERS // of_a_set - 1  # what vLLM captures to see what graphs take is registered as well
        if num_graph_sets > most:
            raise ConfigError(
                f"ladder: {num_graph_sets} levels that differ in a rank's layers, each with {num_graphs} CUDA graphs, "
                f"would register {num_graph_sets * of_a_set:,} buffers with vLLM's custom all-reduce, with room for "
                f"{_ALL_REDUCE_BUFFERS:,}: at most {max(most, 0)} levels. Set fewer ladder.steps or more "
                "layers_per_level, fewer cudagraph_capture_sizes, or --disable-custom-all-reduce."
            )


def has_room_for_graph_sets(vllm_config: VllmConfig, num_graph_sets: int) -> bool:
    """Return whether `check_graph_buffers` passes so many levels that differ in every layer."""
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    try:
        check_graph_buffers(vllm_config, [(str(level),) * num_layers for level in range(num_graph_sets)])
    except ConfigError:
        return False
    return True


def _graphs_of_a_set(vllm_config: VllmConfig) -> int:
    """Return their most: those of mixed batches, and beside them those of decode steps alone."""
    from vllm.config import CUDAGraphMode

    compilation = vllm_config.compilation_config
    mode, sizes = compilation.cudagraph_mode, compilation.cudagraph_capture_sizes or ()
    if mode is None or mode == CUDAGraphMode.NONE:
        return 0
    mixed = len(sizes) if mode.mixed_mode() != CUDAGraphMode.NONE else 0
    decode = sum(size <= vllm_config.scheduler_config.max_num_seqs for size in sizes)
    return mixed + (decode if mode.separate_routine() else 0)
