"""A vLLM engine for the GPU check (tools/gpucheck/engines.py): stock, or with the plugin and levels on request."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from morphserve.integration.offline.level_engine import LevelEngine


class VllmEngine:
    """`Engine` of morphserve/tools/gpucheck/engines.py."""

    def __init__(self, in_process: bool = False, **arguments: Any) -> None:
        """Start vLLM.

        Args:
            in_process: the engine core in this process; levels can be asked for, and `status` answers.
            arguments: of `vllm.LLM`.
        """
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if importlib.util.find_spec("flashinfer") is None:
            # vLLM 0.33 takes FlashInfer's sampler for granted, and a start without the package ends in an ImportError.
            os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        self._engine = LevelEngine(in_process=in_process, **arguments)

    def describe(self) -> dict[str, Any]:
        """Versions and modes; what this vLLM does not have is left out."""
        import vllm

        config = self._engine.engine.vllm_config
        compilation, scheduling = config.compilation_config, config.scheduler_config
        found = {
            "vllm": vllm.__version__,
            "v2_model_runner": getattr(config, "use_v2_model_runner", None),
            "compilation_mode": str(getattr(compilation, "mode", None)),
            "cudagraph_mode": str(getattr(compilation, "cudagraph_mode", None)),
            "capture_sizes": len(getattr(compilation, "cudagraph_capture_sizes", None) or ()),
            "async_scheduling": getattr(scheduling, "async_scheduling", None),
            "num_kv_blocks": getattr(config.cache_config, "num_gpu_blocks", None),
        }
        return {key: value for key, value in found.items() if value is not None}

    def generate(self, num_requests: int, prompt_tokens: int, output_tokens: int) -> list[list[int]]:
        """Greedy tokens of each request; prompts differ from each other, and are the same in every call."""
        prompts = [
            [10 + (97 * request + 31 * place) % 30000 for place in range(prompt_tokens)]
            for request in range(num_requests)
        ]
        return self._engine.generate(prompts, output_tokens)

    def want(self, level: int) -> None:
        """Want a level from the next step on."""
        self._engine.want(level)

    def status(self) -> dict[str, Any]:
        """Empty without the plugin."""
        morph = self._engine.morph
        if morph is None:
            return {}
        return {
            "level": morph.controller.level,
            "in_transition": morph.controller.in_transition,
            "num_kv_blocks": morph.pool.num_kv_blocks,
            "deepest": len(self._engine.ladder) - 1,
        }

    def stop(self) -> None:
        """Shut the engine core down."""
        self._engine.close()
