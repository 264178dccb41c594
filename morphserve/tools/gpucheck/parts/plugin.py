"""T9 to T11: vLLM with the plugin beside stock vLLM: what level 0 costs, swaps under load, KV growth, level 0 after it.

T9 is a small model without graphs, T10 the same compiled and with graphs, T11 the shape of an 8B, compiled, with as
many KV blocks as vLLM finds room for.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.engines import EngineError, EngineProcess, settings, write_model
from morphserve.tools.gpucheck.parts.vllm import PROMPT_TOKENS, REQUESTS, engine_factory, throughput
from morphserve.version import UNPROVEN_CUDA

_LEVEL_S = 60.0  # a transition that takes longer has failed
_CROSS_TOKENS = 1024  # of each request that runs beside a transition: steps must not run out before it ends


@dataclass(frozen=True, slots=True)
class _Case:
    """A model, how it is run, and what the plugin may do to it."""

    model: str
    steps: Sequence[dict[str, Any]]  # of the ladder
    kv_bytes: int | None  # None: what vLLM finds room for
    memory_share: float  # of the device, for each of the two engines
    eager: bool = False


_SMALL_STEPS = ({"format": "fp8", "layers_per_level": 8}, {"format": "w4", "layers": 4, "layers_per_level": 4})
_EAGER = _Case("small", _SMALL_STEPS, 4 << 30, 0.2, eager=True)
_COMPILED = _Case("small", _SMALL_STEPS, 4 << 30, 0.2)
_LARGE = _Case("8B shape", ({"format": "w4", "layers": 16, "layers_per_level": 16},), None, 0.42)


def eager(bench: Bench) -> None:
    """Check a small model without graphs."""
    _run(bench, _EAGER)


def compiled(bench: Bench) -> None:
    """Check a small model, compiled and with graphs."""
    _run(bench, _COMPILED)


def large(bench: Bench) -> None:
    """Check the shape of an 8B, compiled and with graphs."""
    _run(bench, _LARGE)


def plugin_settings(cache: Path, steps: Sequence[dict[str, Any]] = _SMALL_STEPS) -> dict[str, Any]:
    """Return the plugin's settings: levels are asked for by the part, not by a policy."""
    return {"cache_dir": str(cache), "ladder": {"steps": list(steps)}, "policy": {"kind": "static", "level": 0}}


def _run(bench: Bench, case: _Case) -> None:
    factory = engine_factory(bench)
    with patch.dict(os.environ, {UNPROVEN_CUDA: "1"}), tempfile.TemporaryDirectory(prefix="gpu_check_") as directory:
        model = write_model(Path(directory), case.model)
        # In one process with its engine core, where levels can be asked for; so must stock be, to be compared.
        plain = settings(model, case.kv_bytes, memory_share=case.memory_share, eager=case.eager) | {"in_process": True}
        morph = {"morphserve": plugin_settings(Path(directory) / "cache", case.steps)}
        # One after the other: what graphs take is measured as the device's free memory before and after.
        with EngineProcess(factory, plain) as stock:
            bench.figure("start, stock", "s", stock.wait_ready(bench.left_s))
            with EngineProcess(factory, plain | {"additional_config": morph}) as morphing:
                bench.figure("start, plugin", "s", morphing.wait_ready(bench.left_s))
                _check_start(bench, stock, morphing)
                _swap(bench, morphing, bench.pick(128, 4))
                _compare(bench, stock, morphing, bench.pick(128, 4))


def _check_start(bench: Bench, stock: EngineProcess, morphing: EngineProcess) -> None:
    told = [engine.ask("describe", timeout_s=30) for engine in (stock, morphing)]
    for name, found in zip(("stock", "plugin"), told, strict=True):
        bench.note(f"{name}: {found}")
    base = morphing.ask("status", timeout_s=30)
    bench.require("the plugin is loaded", bool(base), "else PYTHONPATH lacks its dist-info")
    if blocks := told[0].get("num_kv_blocks"):
        share = bench.figure("KV blocks of level 0 over stock's", "ratio", base["num_kv_blocks"] / blocks)
        bench.expect("level 0 has at least 98 % of stock's KV blocks", share.median >= 0.98, f"{share.median:.3f}")


def _compare(bench: Bench, stock: EngineProcess, morphing: EngineProcess, output_tokens: int) -> None:
    """Level 0 against stock: the same tokens, and the same speed, in turn."""
    for engine in (stock, morphing):
        throughput(engine, output_tokens, bench.left_s)  # warms up
    ratios, rates, same, pairs = [], [], True, 0
    while pairs < 3 or (pairs < bench.pick(16, 3) and bench.left_s > 0.1 * bench.budget_s):
        order = (stock, morphing) if pairs % 2 else (morphing, stock)
        found = {id(engine): throughput(engine, output_tokens, bench.left_s) for engine in order}
        rates.append(found[id(stock)][0])
        ratios.append(found[id(morphing)][0] / found[id(stock)][0])
        same = same and found[id(morphing)][1] == found[id(stock)][1]
        pairs += 1
    bench.figure("stock's throughput", "tokens/s", rates)
    ratio = bench.figure("throughput of level 0 over stock", "ratio", ratios)
    if not bench.dry:
        bench.expect("level 0 costs no more than 1 %", ratio.median >= 0.99, f"{ratio.median:.3f}")
    bench.require("level 0 gives the stock server's tokens", same, f"{pairs} pairs")


def _swap(bench: Bench, morphing: EngineProcess, output_tokens: int) -> None:
    """Down the ladder and back while requests run."""
    before = throughput(morphing, output_tokens, bench.left_s)[1]
    base = morphing.ask("status", timeout_s=30)
    deepest = base["deepest"]
    for turn in range(bench.pick(3, 1)):
        down = _cross(bench, morphing, deepest, turn)
        grown = down["num_kv_blocks"] - base["num_kv_blocks"]
        bench.require(f"turn {turn}: KV grew by what layers gave up", grown > 0, f"{base['num_kv_blocks']} + {grown}")
        rate, deep = throughput(morphing, output_tokens, bench.left_s)
        if not turn:
            bench.figure("KV blocks gained", "blocks", grown)
            bench.figure("throughput of the deepest level", "tokens/s", rate)
            bench.expect("quantized layers show in tokens", deep != before, "weights made up by vLLM are small")
        up = _cross(bench, morphing, 0, turn)
        same_kv = up["num_kv_blocks"] == base["num_kv_blocks"]
        bench.require(f"turn {turn}: level 0 has its KV blocks again", same_kv, str(up))
        after = throughput(morphing, output_tokens, bench.left_s)[1]
        bench.require(f"turn {turn}: the same tokens before and after", after == before, f"{len(before)} requests")


def _cross(bench: Bench, engine: EngineProcess, level: int, turn: int) -> dict[str, Any]:
    """Go to a level while requests decode, and return the status then."""
    found = engine.ask("cross", level, REQUESTS, PROMPT_TOKENS, _CROSS_TOKENS, timeout_s=min(_LEVEL_S, bench.left_s))
    status: dict[str, Any] = engine.ask("status", timeout_s=30)
    if status["level"] != level or status["in_transition"]:
        raise EngineError(f"level {level} is not reached while {REQUESTS} requests decode: {status}")
    what = f"to level {level}, turn {turn}"
    bench.figure(f"{what}: transition under load", "ms", found["transition_s"] * 1e3)
    quiet = bench.figure(f"{what}: step before", "ms", [s * 1e3 for s in found["before_s"]])
    if found["beside_s"]:
        beside = bench.figure(f"{what}: step beside", "ms", [s * 1e3 for s in found["beside_s"]])
        ratio = beside.p99 / quiet.median
        if not bench.dry:
            bench.expect(f"{what}: p99 step within 1.2 medians", ratio <= 1.2, f"{ratio:.2f}, longest {beside.most:.1f}")
    bench.figure(f"{what}: step after", "ms", [s * 1e3 for s in found["after_s"]])
    return status
