"""T9: vLLM with the plugin beside stock vLLM: what level 0 costs, swaps under load, KV growth, and level 0 after it."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.engines import EngineError, EngineProcess, settings, write_model
from morphserve.tools.gpucheck.parts.vllm import engine_factory, throughput
from morphserve.version import UNPROVEN_CUDA

_ENOUGH_FOR_8B_S = 170.0
_KV_BYTES = 4 << 30
_SHARE = 0.4  # of the device, for each of the two engines
_LEVEL_S = 60.0  # a transition that takes longer has failed


def run(bench: Bench) -> None:
    """See the module."""
    with patch.dict(os.environ, {UNPROVEN_CUDA: "1"}):  # to prove it is what this is for
        _run(bench)


def _run(bench: Bench) -> None:
    factory = engine_factory(bench)
    name = "8B shape" if bench.left_s > bench.pick(_ENOUGH_FOR_8B_S, 1e9) else "small"
    with tempfile.TemporaryDirectory(prefix="gpu_check_models_") as directory:
        model = write_model(Path(directory), name)
        # In one process with its engine core, where levels can be asked for; so must stock be, to be compared.
        plain = settings(model, _KV_BYTES, memory_share=_SHARE) | {"in_process": True}
        morph = {"morphserve": plugin_settings(Path(directory) / "cache")}
        plugin = settings(model, _KV_BYTES, morph, _SHARE) | {"in_process": True}
        # One after the other: what graphs take is measured as the device's free memory before and after.
        with EngineProcess(factory, plain) as stock:
            bench.figure(f"{name}: start, stock", "s", stock.wait_ready(bench.left_s))
            with EngineProcess(factory, plugin) as morphing:
                bench.figure(f"{name}: start, plugin", "s", morphing.wait_ready(bench.left_s))
                bench.note(f"{name}: {morphing.ask('describe', timeout_s=30)}")
                _compare(bench, stock, morphing, bench.pick(128, 4))
                _swap(bench, morphing, bench.pick(256, 4))


def plugin_settings(cache: Path) -> dict[str, Any]:
    """Return the plugin's settings: two levels in 4 bits, asked for by the part, not by a policy."""
    return {
        "cache_dir": str(cache),
        "ladder": {"steps": [{"format": "w4", "layers": 4, "layers_per_level": 2}]},
        "policy": {"kind": "static", "level": 0},
    }


def _compare(bench: Bench, stock: EngineProcess, morphing: EngineProcess, output_tokens: int) -> None:
    """Level 0 against stock: the same tokens, and the same speed, in turn."""
    for engine in (stock, morphing):
        throughput(engine, output_tokens, bench.left_s)  # warms up
    ratios, same, pairs = [], True, 0
    while pairs < 3 or (pairs < bench.pick(12, 3) and bench.left_s > 0.35 * bench.budget_s):
        order = (stock, morphing) if pairs % 2 else (morphing, stock)
        found = {id(engine): throughput(engine, output_tokens, bench.left_s) for engine in order}
        ratios.append(found[id(morphing)][0] / found[id(stock)][0])
        same = same and found[id(morphing)][1] == found[id(stock)][1]
        pairs += 1
    ratio = bench.figure("throughput of level 0 over stock", "ratio", ratios)
    if not bench.dry:
        bench.expect("level 0 costs no more than 2 %", ratio.median >= 0.98, f"{ratio.median:.3f}")
    bench.require("level 0 gives the stock server's tokens", same, f"{pairs} pairs")


def _swap(bench: Bench, morphing: EngineProcess, output_tokens: int) -> None:
    """Down the ladder and back while requests run."""
    before = throughput(morphing, output_tokens, bench.left_s)[1]
    base = morphing.ask("status", timeout_s=30)
    bench.require("the plugin is loaded", bool(base), "else PYTHONPATH lacks its dist-info")
    deepest = base["deepest"]
    down = _under_load(bench, morphing, output_tokens, deepest)
    bench.require("it got to the deepest level", down["level"] == deepest, str(down))
    grown = down["num_kv_blocks"] - base["num_kv_blocks"]
    bench.figure("KV blocks gained", "blocks", grown)
    bench.require("KV grew by what layers gave up", grown > 0, f"{base['num_kv_blocks']} and {grown} more")
    deep = throughput(morphing, output_tokens, bench.left_s)[1]
    bench.expect("quantized layers show in tokens", deep != before, "weights made up by vLLM are small: they may not")
    up = _under_load(bench, morphing, output_tokens, 0)
    bench.require("it came back", up["level"] == 0 and up["num_kv_blocks"] == base["num_kv_blocks"], str(up))
    after = throughput(morphing, output_tokens, bench.left_s)[1]
    bench.require("the same tokens before and after", after == before, f"{len(before)} requests of {output_tokens}")


def _under_load(bench: Bench, engine: EngineProcess, output_tokens: int, level: int) -> dict[str, Any]:
    """Ask for a level and let requests run until it is there; the status then."""
    start = time.perf_counter()
    engine.ask("want", level, timeout_s=30)
    rates = []
    while True:
        rate, _ = throughput(engine, output_tokens, bench.left_s)
        rates.append(rate)
        status: dict[str, Any] = engine.ask("status", timeout_s=30)
        if status["level"] == level and not status["in_transition"]:
            break
        if time.perf_counter() - start > _LEVEL_S:
            raise EngineError(f"level {level} is not reached after {_LEVEL_S:.0f} s: {status}")
    bench.figure(f"until level {level} is there, seen between two batches", "s", time.perf_counter() - start)
    bench.figure(f"decode on the way to level {level}", "tokens/s", rates)
    return status
