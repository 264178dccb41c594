"""Engines in processes of their own, asked through pipes: two of them can take turns, and neither sees the other.

What an engine is, `Engine` says. integration/offline/gpu_smoke.py makes one of vLLM; `StandIn` is for dry runs, a
command for machines that have neither a GPU nor vLLM.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from morphserve.tools.children import end_with
from morphserve.tools.gpucheck.bench import OutOfTime
from morphserve.tools.gpucheck.machine import device_bytes

VLLM_ENGINE = "morphserve.integration.offline.gpu_smoke:VllmEngine"
STAND_IN = "morphserve.tools.gpucheck.engines:StandIn"
_STOP_S = 10.0

# Llama configs; no weights travel, `load_format="dummy"` makes them.
_LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "8B shape": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "small": {
        **_LLAMA,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32000,
    },
}


class Engine(Protocol):
    """What the parts ask of an engine."""

    def describe(self) -> dict[str, Any]:
        """Versions and modes, as the engine resolved them."""
        ...

    def generate(self, num_requests: int, prompt_tokens: int, output_tokens: int) -> list[list[int]]:
        """Greedy tokens of each request; all in flight at once."""
        ...

    def cross(self, level: int, num_requests: int, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
        """Go to a level while greedy requests decode; they end with it.

        Returns:
            `transition_s`, and the seconds of steps `before_s`, `beside_s` and `after_s`.
        """
        ...

    def steps(self, num_requests: int, prompt_tokens: int, num_steps: int) -> list[float]:
        """Return the seconds of decode steps, with all requests in each."""
        ...

    def status(self) -> dict[str, Any]:
        """Return `level`, `num_kv_blocks`, `in_transition`, `deepest`; empty for an engine without the plugin."""
        ...

    def stop(self) -> None:
        """Give the device back."""
        ...


class EngineError(Exception):
    """An engine failed or did not answer; the message has its own words."""


def write_model(directory: Path, name: str) -> Path:
    """Write a model directory that holds nothing but a config."""
    target = directory / name.replace(" ", "_")
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(dict(MODELS[name])), encoding="utf-8")
    return target


def settings(
    model: Path, kv_bytes: int, needed_bytes: int, most: float, *, eager: bool = False
) -> dict[str, Any]:
    """Arguments of an engine: those of a server, but for weights, tokenizer and a small KV cache.

    Args:
        model: directory of the config.
        kv_bytes: of the KV cache at level 0.
        needed_bytes: of the device, that must be free when it starts: what the largest model takes, at least.
        most: share of the device that this may be; smaller models do on smaller devices.
        eager: without compilation and graphs.
    """
    return {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "max_num_seqs": 64,
        "gpu_memory_utilization": min(round(needed_bytes / device_bytes(), 4), most),
        "enable_prefix_caching": False,
        "enforce_eager": eager,
        "kv_cache_memory_bytes": kv_bytes,
        "seed": 0,
    }


class EngineProcess:
    """An engine in a process of its own."""

    def __init__(self, factory: str, arguments: Mapping[str, Any]) -> None:
        """Begin to start; `wait_ready` waits until it has.

        Args:
            factory: "module:Class" of an `Engine`.
            arguments: that the class takes.
        """
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pipe, theirs = context.Pipe()
        # Not a daemon: vLLM starts processes of its own. The frame ends whatever a part leaves behind.
        self._process = context.Process(target=_serve, args=(theirs, factory, dict(arguments), os.getpid()))
        self._process.start()
        theirs.close()

    def wait_ready(self, timeout_s: float) -> float:
        """Seconds that the start took, imports included.

        Raises:
            EngineError: it failed.
            OutOfTime: it is not ready in time.
        """
        try:
            return float(self._answer("start", timeout_s))
        except TimeoutError as e:
            raise OutOfTime(str(e)) from e

    def ask(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method of the engine.

        Raises:
            EngineError: it failed, or does not answer in time.
        """
        self._pipe.send((method, args))
        try:
            return self._answer(method, timeout_s)
        except TimeoutError as e:
            raise EngineError(f"{e} See the end of the part's output.") from e

    def stop(self) -> None:
        """End the engine and its process, whatever state they are in."""
        with contextlib.suppress(EngineError, OSError):
            self.ask("stop", timeout_s=_STOP_S)
        self._process.join(_STOP_S / 2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _answer(self, method: str, timeout_s: float) -> Any:
        try:
            if not self._pipe.poll(max(timeout_s, 0)):
                raise TimeoutError(f"{method}: no answer in {timeout_s:.0f} s.")
            ok, value = self._pipe.recv()
        except EOFError:
            self._process.join(1)
            raise EngineError(f"{method}: the engine's process ended, exit code {self._process.exitcode}.") from None
        if not ok:
            raise EngineError(f"{method}: {value}")
        return value


def _serve(pipe: Any, factory: str, arguments: dict[str, Any], part: int) -> None:
    """Run in the engine's process, a child of the part's."""
    end_with(part)
    start = time.perf_counter()
    try:
        module, _, name = factory.partition(":")
        engine: Engine = getattr(importlib.import_module(module), name)(**arguments)
        pipe.send((True, time.perf_counter() - start))
    except BaseException as e:  # refusals of vLLM are SystemExit at times
        traceback.print_exc()
        pipe.send((False, f"{type(e).__name__}: {e}"[:1000]))
        return
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(engine, method)(*args)))
        except Exception as e:
            traceback.print_exc()
            pipe.send((False, f"{type(e).__name__}: {e}"[:1000]))
        if method == "stop":
            return


class StandIn:
    """In place of vLLM in a dry run, which tries T8 to T11 and the pipes between processes where nothing is installed.

    Tokens depend on request, place and level, and levels change at once.
    """

    def __init__(self, **arguments: Any) -> None:
        self._morphs = "additional_config" in arguments
        self._level = 0

    def describe(self) -> dict[str, Any]:
        """Says that it is none."""
        return {"engine": "stand-in, not vLLM"}

    def generate(self, num_requests: int, prompt_tokens: int, output_tokens: int) -> list[list[int]]:
        """Another level gives other tokens, as rounding does."""
        seed = 1000 * self._level + prompt_tokens
        starts = [seed + 31 * request for request in range(num_requests)]
        return [[(start + place) % 997 for place in range(output_tokens)] for start in starts]

    def cross(self, level: int, num_requests: int, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
        """Go there at once."""
        self._level = level
        return {"transition_s": 1e-3, "before_s": [1e-3], "beside_s": [], "after_s": [1e-3]}

    def steps(self, num_requests: int, prompt_tokens: int, num_steps: int) -> list[float]:
        """Make steps that take no time worth the name."""
        return [1e-3] * num_steps

    def status(self) -> dict[str, Any]:
        """Return what the plugin's does."""
        if not self._morphs:
            return {}
        return {"level": self._level, "num_kv_blocks": 100 + 50 * self._level, "in_transition": False, "deepest": 2}

    def stop(self) -> None:
        """Do nothing: nothing is held."""
