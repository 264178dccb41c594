"""The engine sections of check_packed.py: a real vLLM engine on the stub driver, with the plugin, through its levels.

Everything but the arithmetic is what a GPU runs: vLLM's start, its memory profile and captures, torch's CUDA objects,
the driver's bindings, Triton's and Inductor's compilers. Kernels compute nothing, so tokens mean nothing. `stand_in`
replaces what the stub cannot give: counts that a kernel would have written, proofs of kernels, packed weights.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from packed_rows import Missed, keep_rows_apart, row, want

from morphserve.integration.offline import LevelEngine
from morphserve.version import UNPROVEN_CUDA
from policies import Decision, Signals

_LEVELS = (2, 4, 0)
_UNDER_LOAD = {0: 4, 60: 0, 120: 2, 160: 0}  # decision |-> level, while more requests run than level 0 has blocks for
_STEPS = [{"format": "fp8", "layers_per_level": 2}, {"format": "w4", "layers_per_level": 2}]
_MORPHSERVE = {
    "policy": {"kind": "static", "level": 0},
    "transition": {"max_layers_per_step": 2, "max_pause_ms": 1e6},
    "ladder": {"steps": _STEPS},
}
_GRAPHS = {"eager": None, "full": (0, "FULL_DECODE_ONLY"), "compiled": (3, "FULL_AND_PIECEWISE")}
_SIZES = [1, 2, 4, 8, 16]
_SMALL_KV_BYTES = 8 << 20  # under load, blocks of running requests must move before a restore
_REQUESTS, _TOKENS = 16, 200


_loaded: dict[str, str] = {}  # parameter |-> digest, before its layer moves into the arena


def _digest(parameter: Any) -> str:
    """Of bytes that are read as a copy from the device would read them."""
    return hashlib.sha256(ctypes.string_at(parameter.data_ptr(), parameter.nbytes)).hexdigest()


class Script:
    """A policy: the level by number of the decision."""

    predictions = None
    max_level = 99

    def __init__(self, script: dict[int, int]) -> None:
        self._script, self._level, self._count = dict(script), 0, 0

    def decide(self, signals: Signals) -> Decision:
        self._level = self._script.get(self._count, self._level)
        self._count += 1
        return Decision(self._level, "script")


def stand_in() -> None:
    """What kernels would have computed and the start relies on."""
    import torch

    from morphserve.integration.worker import profile_source as rank_profile
    from morphserve.integration.worker import sources
    from quant_layers.kernels import selftest

    def one_token_each(num_sampled: Any, *rest: Any) -> tuple[Any, Any]:
        num_sampled.copy_(torch.ones(num_sampled.shape, dtype=num_sampled.dtype))
        return num_sampled, torch.zeros_like(num_sampled)

    def first_that_fits(fmt: str, dtype: Any, name: Any, device: str, shapes: Any = (), groups: Any = ()) -> Any:
        makes: Any = selftest.by_preference(fmt, device)
        for kernel in (make(dtype) for make in makes):
            if not kernel.unavailable():
                for n, k in shapes:
                    kernel.check_shape(n, k)
                return kernel
        raise Missed(f"no kernel for {fmt}")

    def on_the_host(self: Any, layer: int, kernel: Any, weights: Any) -> Any:
        device = next(iter(weights.values())).device
        made = {name: torch.randn(weight.shape).mul_(0.02).to(weight.dtype) for name, weight in weights.items()}
        packed = {name: kernel.pack(weight) for name, weight in made.items()}
        return {name: {key: tensor.to(device) for key, tensor in found.items()} for name, found in packed.items()}

    def with_weights(self: Any, model: Any) -> None:
        for parameter in model.parameters():  # vLLM's dummy weights are made by kernels: all would be zero
            parameter.data.copy_(torch.randn(parameter.shape).to(parameter.dtype))
        _loaded.update({name: _digest(parameter) for name, parameter in model.named_parameters()})
        capture(self, model)

    layers: Any = importlib.import_module("morphserve.integration.worker.layers").RankLayers
    capture, layers.capture = layers.capture, with_weights
    sampler: Any = importlib.import_module("vllm.v1.worker.gpu.sample.sampler")
    sampler.get_num_sampled_and_rejected = one_token_each
    _clear_tokens(sampler.Sampler, "__call__")
    _clear_tokens(importlib.import_module("vllm.v1.sample.sampler").Sampler, "forward")
    replaced: Any = sources
    replaced.choose = first_that_fits
    plain: Any = rank_profile.Plain
    plain.pack = on_the_host


def _clear_tokens(sampler: Any, name: str) -> None:
    """Token 0 in place of what the memory held: a request that is preempted comes back with its tokens."""
    original = getattr(sampler, name)

    @functools.wraps(original)
    def cleared(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        tokens = output.sampled_token_ids
        tokens.copy_(tokens.new_zeros(tokens.shape, device="cpu"))  # filling would be a kernel, copying is none
        return output

    setattr(sampler, name, cleared)


class Engine(LevelEngine):
    """In this process, so that core and worker can be looked at."""

    def __init__(self, graphs: str) -> None:
        choice = _GRAPHS[graphs]
        how: dict[str, Any] = {"enforce_eager": True}
        if choice is not None:
            how = {"compilation_config": dict(mode=choice[0], cudagraph_mode=choice[1], cudagraph_capture_sizes=_SIZES)}
        if graphs != "compiled":  # there vLLM measures what is left, graphs of all graph sets included
            how["kv_cache_memory_bytes"] = _SMALL_KV_BYTES
        super().__init__(
            os.getcwd(),
            _MORPHSERVE,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=512,
            max_num_seqs=_REQUESTS,
            gpu_memory_utilization=0.5,
            seed=0,
            **how,
        )

    def answer(self, num_requests: int, num_tokens: int) -> list[int]:
        """Numbers of tokens that came."""
        prompts = [[3 + (7 * i + j) % 900 for j in range(30)] for i in range(num_requests)]
        return [len(tokens) for tokens in self.generate(prompts, num_tokens)]

    def follow(self, script: dict[int, int]) -> None:
        """From the next step on."""
        self.morph.controller.replace_policy(Script(script), "a check on a stub driver", self.morph.setup)

    def weights(self) -> dict[str, tuple[int, str]]:
        """Address and digest of each parameter."""
        return {name: (p.data_ptr(), _digest(p)) for name, p in self.worker.model_runner.model.named_parameters()}


def counts() -> dict[str, int]:
    """What the stub driver has been asked for so far, captures included."""
    numbers = (ctypes.c_ulonglong * 4)()
    ctypes.CDLL("libcuda.so.1").fake_counts(numbers)
    return dict(zip(("kernels", "graph launches", "copies", "captures"), numbers, strict=True))


def run(runner: str, graphs: str) -> None:
    """One engine: start, each level, down and up again under load, and everything back as it was."""
    os.environ.update({UNPROVEN_CUDA: "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"})
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if runner == "v2" else "0"
    importlib.import_module("morphserve.plugin").register()
    stand_in()
    begun: list[Engine] = []

    def start() -> str:
        begun.append(Engine(graphs))
        return f"{type(begun[0].worker.model_runner).__module__}, {_layout(begun[0])}"

    row("starts", start)
    if not begun:
        return
    engine = begun[0]
    row("captured", partial(_captured, engine, graphs))
    row("level 0 has what graphs left", partial(_spare, engine, graphs))
    row("generates", lambda: want(engine.answer(3, 8), [8] * 3))
    pages, weights = engine.memory(), engine.weights()
    row("weights are what was loaded", lambda: _same({n: d for n, (_, d) in weights.items()}, _loaded))
    for level in _LEVELS:
        row(f"level {level}", partial(_at_level, engine, level, graphs))
    row("under load", partial(_under_load, engine))
    row("pages come back", lambda: want(engine.memory(), pages))
    row("weights come back, at their addresses", lambda: _same(engine.weights(), weights))
    row("nothing has failed", partial(_healthy, engine))
    engine.close()


def _same(now: Mapping[str, Any], then: Mapping[str, Any]) -> str:
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    want(changed, [])
    return f"{len(now)} parameters"


def _healthy(engine: Engine) -> str:
    """No transition has failed, and none is refused from now on."""
    status = engine.morph.controller.status()
    want(status["failed"], False)
    return f"{status['phase']} at level {want(status['level'], 0)}"


def _layout(engine: Engine) -> str:
    return f"KV blocks by level {[level.num_kv_blocks for level in engine.morph.runtime.ladder]}"


def _captured(engine: Engine, graphs: str) -> str:
    """Captures are as many as graph sets hold, or none."""
    state = importlib.import_module("morphserve.integration.worker.state")
    have = state.rank().graphs
    if graphs == "eager":
        return f"none: {want(have, None)}"
    graph_sets = have._sets.num_graphs()
    of_levels = [graph_sets.pop(level.layer_formats) for level in engine.morph.runtime.ladder]
    first, *later = of_levels
    want(min(later) > 0, True)
    want(max(later) < first, graphs == "compiled")  # levels share pieces; of whole steps each has its own
    want(bool(graph_sets), graphs == "compiled" and hasattr(engine.worker.model_runner, "cudagraph_manager"))
    return f"{of_levels} graphs by level, {list(graph_sets.values())} in sets of pieces alone"


def _spare(engine: Engine, graphs: str) -> str:
    """What is kept for graphs is more than they take; where vLLM does not measure, nothing is kept."""
    state = importlib.import_module("morphserve.integration.worker.state")
    planned, have = state.rank().base_num_blocks, engine.morph.pool.num_kv_blocks
    want(have > planned, graphs == "compiled")
    want(state.rank().kv.num_mapped, have)
    return f"{have} KV blocks, {planned} planned; kept for a graph set {state.rank().graph_set_bytes / 2**20:.0f} MiB"


def _at_level(engine: Engine, level: int, graphs: str) -> str:
    engine.set_level(level)
    wanted = engine.morph.runtime.ladder[level]
    want(engine.morph.pool.num_kv_blocks, wanted.num_kv_blocks)
    want(tuple(fmt for _, fmt in sorted(engine.memory()["formats"].items())), wanted.layer_formats)
    before = counts()["graph launches"]
    want(engine.answer(4, 8), [8] * 4)
    launched = counts()["graph launches"] - before
    want(launched > 0, graphs != "eager")
    return f"{engine.morph.pool.num_kv_blocks} KV blocks, {launched} graphs launched"


def _under_load(engine: Engine) -> str:
    moved = _count_moves()
    engine.follow(_UNDER_LOAD)
    told = engine.answer(_REQUESTS, _TOKENS)
    engine.set_level(0)
    want(told, [_TOKENS] * _REQUESTS)
    return f"{_REQUESTS} requests of {_TOKENS} tokens, {sum(moved)} live blocks moved"


def _count_moves() -> list[int]:
    """Numbers of blocks that are copied from now on, one entry a command."""
    state = importlib.import_module("morphserve.integration.worker.state")
    kv: Any = type(state.rank().kv)
    original, moved = kv.copy, list[int]()

    def copy(self: Any, pairs: Any) -> None:
        moved.append(len(pairs))
        original(self, pairs)

    kv.copy = copy
    return moved


if __name__ == "__main__":
    keep_rows_apart()
    run(*sys.argv[1].split("_")[1:])
    print(counts(), file=sys.stderr)
