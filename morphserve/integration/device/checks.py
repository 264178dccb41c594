"""Refusals of an engine on a device, made before weights are loaded."""

from __future__ import annotations

from typing import Any

from morphserve.errors import ConfigError


def check_device(vllm_config: Any) -> None:
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
            v.weight_transfer_config is not None,
            "weights that are sent in later would be lost with the first restore",
            "--weight-transfer-config",
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
