"""A vLLM engine for the GPU check (tools/gpucheck/engines.py): stock, or with the plugin and levels on request."""

from __future__ import annotations

import importlib.util
import os
import time
from typing import Any

from morphserve.integration.offline.level_engine import LevelEngine

_PREFILLS = 8  # steps after which all requests decode
_STEPS = 100  # timed before a transition, and after it


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
        _make_weights_matter()
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
        return self._engine.generate(_prompts(num_requests, prompt_tokens), output_tokens)

    def cross(self, level: int, num_requests: int, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
        """Go to a level while requests decode. They end with it; the transition may not be done before they are."""
        engine = self._begin(num_requests, prompt_tokens, output_tokens)
        before = [engine.timed_step() for _ in range(_STEPS)]
        start = time.perf_counter()
        engine.want(level)
        beside = []
        while engine.num_requests and not engine.is_at(level):
            beside.append(engine.timed_step())
        seconds = time.perf_counter() - start
        after = [engine.timed_step() for _ in range(_STEPS) if engine.num_requests]
        engine.abort_all()
        return {"transition_s": seconds, "before_s": before, "beside_s": beside, "after_s": after}

    def steps(self, num_requests: int, prompt_tokens: int, num_steps: int) -> list[float]:
        """Return the seconds of decode steps, with all requests in each."""
        engine = self._begin(num_requests, prompt_tokens, num_steps + 2 * _PREFILLS)
        seconds = [engine.timed_step() for _ in range(num_steps)]
        engine.abort_all()
        return seconds

    def _begin(self, num_requests: int, prompt_tokens: int, output_tokens: int) -> LevelEngine:
        """Queue requests, and step until all of them decode."""
        for prompt in _prompts(num_requests, prompt_tokens):
            self._engine.add(prompt, output_tokens)
        for _ in range(_PREFILLS):
            self._engine.step()
        return self._engine

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


def _make_weights_matter() -> None:
    """Scale what vLLM makes up, up to 0.001 everywhere, as weights are: else no layer changes a token."""
    module: Any = importlib.import_module("vllm.model_executor.model_loader.dummy_loader")
    original = module.initialize_single_dummy_weight
    if original.__module__ == __name__:  # an earlier engine of this process has
        return

    def scaled(param: Any, *args: Any, **kwargs: Any) -> None:
        original(param, *args, **kwargs)
        if not param.is_floating_point() or param.is_meta:
            return
        if param.ndim < 2:
            param.data.fill_(1)
        else:
            param.data.mul_(1000 * (3 / param.shape[-1]) ** 0.5)  # a linear keeps the size of what goes through it

    module.initialize_single_dummy_weight = scaled


def _prompts(num_requests: int, num_tokens: int) -> list[list[int]]:
    places = range(num_tokens)
    return [[10 + (97 * request + 31 * place) % 30000 for place in places] for request in range(num_requests)]
