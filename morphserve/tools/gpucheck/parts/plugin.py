"""T9 to T11: vLLM with the plugin beside stock vLLM: what level 0 costs, swaps under load, KV growth, level 0 after it.

T9 is a small model without graphs, T10 the same compiled and with graphs. T11 is the shape of an 8B, compiled and with
graphs; then a second engine changes a level in several batches, as one does whose reserve is small.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from morphserve.tools.gpucheck.bench import Bench, OutOfTime
from morphserve.tools.gpucheck.engines import EngineError, EngineProcess, settings, write_model
from morphserve.tools.gpucheck.parts.vllm import PROMPT_TOKENS, REQUESTS, engine_factory, throughput
from morphserve.version import UNPROVEN_CUDA

_FREE = (24 << 30, 0.3)  # bytes and share of the device: the lesser is free when an engine starts
# Else Inductor times kernels that round differently and takes the quickest, for stock and plugin each by itself: a
# norm of 4,096 in one pass or two. The environment's variable does not reach it: when Inductor is called, torch has
# set that to torch.are_deterministic_algorithms_enabled() (torch/_dynamo/convert_frame.py, preserve_global_state).
_REPEATABLE = {"inductor_compile_config": {"deterministic": True}}
_LEVEL_S = 60.0  # a transition that takes longer has failed
_START_S = 120.0  # a second engine with the plugin is not begun with less: 75 s to start and 45 for its ways
_WAYS_S = 45.0
_FOR_BATCHES = 0.45  # of the time, for that engine: a start and six ways
_CROSS_TOKENS = 1024  # of each request that runs beside a transition: steps must not run out before it ends


@dataclass(frozen=True, slots=True)
class _Case:
    """A model, how it is run, and what the plugin may do to it."""

    model: str
    steps: Sequence[dict[str, Any]]  # of the ladder
    kv_bytes: int
    whole: int  # layers of its largest level, which change at once
    eager: bool = False
    batch: int | None = None  # a second engine with the plugin changes so many layers at a time


_SMALL_STEPS = ({"format": "fp8", "layers_per_level": 8}, {"format": "w4", "layers": 4, "layers_per_level": 4})
_EAGER = _Case("small", _SMALL_STEPS, 4 << 30, 8, eager=True)
_COMPILED = _Case("small", _SMALL_STEPS, 4 << 30, 8)
_LARGE = _Case("8B shape", ({"format": "w4", "layers": 16, "layers_per_level": 16},), 2 << 30, 16, batch=3)


def eager(bench: Bench) -> None:
    """Check a small model without graphs."""
    _run(bench, _EAGER)


def compiled(bench: Bench) -> None:
    """Check a small model, compiled and with graphs."""
    _run(bench, _COMPILED)


def large(bench: Bench) -> None:
    """Check the shape of an 8B, compiled and with graphs."""
    _run(bench, _LARGE)


def plugin_settings(
    cache: Path, steps: Sequence[dict[str, Any]] = _SMALL_STEPS, batch: int | None = None
) -> dict[str, Any]:
    """Return the plugin's settings: levels are asked for by the part, not by a policy."""
    found = {"cache_dir": str(cache), "ladder": {"steps": list(steps)}, "policy": {"kind": "static", "level": 0}}
    return found if batch is None else {**found, "transition": {"max_layers_per_step": batch}}


def _run(bench: Bench, case: _Case) -> None:
    factory = engine_factory(bench)
    with (
        patch.dict(os.environ, {UNPROVEN_CUDA: "1"}),
        tempfile.TemporaryDirectory(prefix="gpu_check_") as directory,
        ExitStack() as stack,
    ):
        model = write_model(Path(directory), case.model)
        # In one process with its engine core, where levels can be asked for; so must stock be, to be compared.
        plain = settings(model, case.kv_bytes, *_FREE, eager=case.eager) | {"in_process": True}
        plain |= {} if case.eager else {"compilation_config": _REPEATABLE}

        def begin(**more: Any) -> EngineProcess:
            return stack.enter_context(EngineProcess(factory, plain | more))

        def morph(name: str, batch: int) -> EngineProcess:
            own = plugin_settings(Path(directory) / name, case.steps, batch)
            return begin(additional_config={"morphserve": own})

        engines = {"stock": begin(), "plugin": morph("whole", case.whole)}  # at once: neither measures free memory
        for name, engine in engines.items():
            _wait_ready(bench, name, engine)
        stock, morphing = engines.values()
        bench.require("the plugin is loaded", bool(morphing.ask("status", timeout_s=30)), "PYTHONPATH has a dist-info?")
        _swap(bench, morphing, bench.pick(128, 4))
        _compare(bench, stock, morphing, bench.pick(128, 4), 0.1 if case.batch is None else _FOR_BATCHES)
        if case.batch is not None:
            _in_batches(bench, case.batch, lambda: morph("parts", case.batch))


def _in_batches(bench: Bench, batch: int, begin: Callable[[], EngineProcess]) -> None:
    """Swap so many layers at a time, in an engine that starts alone: what its graph sets take decides how many.

    Memory that another engine takes meanwhile would count as theirs, and there would be no sets beside levels.
    """
    name = f"plugin, {batch} layers at a time"
    if bench.left_s < bench.pick(_START_S, 0):
        return bench.expect(f"{name}: measured", False, f"{bench.left_s:.0f} s are left, it needs {_START_S:.0f}")
    engine = begin()
    try:
        _wait_ready(bench, name, engine)
    except OutOfTime as e:
        return bench.expect(f"{name}: measured", False, str(e))
    if bench.left_s < bench.pick(_WAYS_S, 0):
        return bench.expect(f"{name}: measured", False, f"{bench.left_s:.0f} s are left when it is up")
    _swap(bench, engine, bench.pick(128, 4), f"{batch} layers at a time: ")


def _wait_ready(bench: Bench, name: str, engine: EngineProcess) -> None:
    bench.figure(f"start, {name}", "s", engine.wait_ready(bench.left_s))
    bench.note(f"{name}: {engine.ask('describe', timeout_s=30)}")


def _compare(
    bench: Bench, stock: EngineProcess, morphing: EngineProcess, output_tokens: int, kept: float
) -> None:
    """Level 0 against stock: the same tokens, and the same speed, in turn; a share of the time is kept for others."""
    for engine in (stock, morphing):
        throughput(engine, output_tokens, bench.left_s)  # warms up
    ratios, rates, steps, pairs = [], [], [], 0
    parted: list[int] = []  # tokens that a request has in common with stock's, where they part
    while pairs < 3 or (pairs < bench.pick(16, 3) and bench.left_s > kept * bench.budget_s):
        order = (stock, morphing) if pairs % 2 else (morphing, stock)
        found = {id(engine): throughput(engine, output_tokens, bench.left_s) for engine in order}
        rates.append(found[id(stock)][0])
        ratios.append(found[id(morphing)][0] / found[id(stock)][0])
        answers = zip(found[id(stock)][1], found[id(morphing)][1], strict=True)
        parted += [_in_common(ours, stocks) for stocks, ours in answers if ours != stocks]
        took = {id(engine): _steps(bench, engine, output_tokens) for engine in order}
        steps.append(statistics.median(took[id(morphing)]) / statistics.median(took[id(stock)]))
        if not pairs:
            bench.figure("decode step of stock", "ms", [s * 1e3 for s in took[id(stock)]])
            bench.figure("decode step of level 0", "ms", [s * 1e3 for s in took[id(morphing)]])
        pairs += 1
    bench.figure("stock's throughput", "tokens/s", rates)
    bench.figure("throughput of level 0 over stock", "ratio", ratios)
    ratio = bench.figure("decode step of level 0 over stock's, medians of neighbouring runs", "ratio", steps)
    if not bench.dry:
        bench.expect("level 0 costs no more than 1 % of a step", ratio.median <= 1.01, f"{ratio.median:.3f}")
    detail = f"{len(parted)} of {pairs * REQUESTS} answers part, the first after {min(parted, default=0)} tokens"
    bench.require("level 0 gives the stock server's tokens", not parted, detail if parted else f"{pairs} pairs")


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def _steps(bench: Bench, engine: EngineProcess, num_steps: int) -> list[float]:
    found: list[float] = engine.ask("steps", REQUESTS, PROMPT_TOKENS, num_steps, timeout_s=bench.left_s)
    return found


def _swap(bench: Bench, morphing: EngineProcess, output_tokens: int, of: str = "") -> None:
    """Down the ladder and back while requests run."""
    before = throughput(morphing, output_tokens, bench.left_s)[1]
    base = morphing.ask("status", timeout_s=30)
    deepest = base["deepest"]
    for turn in range(bench.pick(3, 1)):
        down = _cross(bench, morphing, deepest, f"{of}turn {turn}")
        grown = down["num_kv_blocks"] - base["num_kv_blocks"]
        detail = f"{base['num_kv_blocks']} + {grown}"
        bench.require(f"{of}turn {turn}: KV grew by what layers gave up", grown > 0, detail)
        rate, deep = throughput(morphing, output_tokens, bench.left_s)
        if not turn:
            bench.figure(f"{of}KV blocks gained", "blocks", grown)
            bench.figure(f"{of}throughput of the deepest level", "tokens/s", rate)
            bench.expect(f"{of}quantized layers show in tokens", deep != before, "as they should")
        up = _cross(bench, morphing, 0, f"{of}turn {turn}")
        same_kv = up["num_kv_blocks"] == base["num_kv_blocks"]
        bench.require(f"{of}turn {turn}: level 0 has its KV blocks again", same_kv, str(up))
        after = throughput(morphing, output_tokens, bench.left_s)[1]
        bench.require(f"{of}turn {turn}: the same tokens before and after", after == before, f"{len(before)} requests")


def _cross(bench: Bench, engine: EngineProcess, level: int, turn: str) -> dict[str, Any]:
    """Go to a level while requests decode, and return the status then."""
    found = engine.ask("cross", level, REQUESTS, PROMPT_TOKENS, _CROSS_TOKENS, timeout_s=min(_LEVEL_S, bench.left_s))
    status: dict[str, Any] = engine.ask("status", timeout_s=30)
    if status["level"] != level or status["in_transition"]:
        raise EngineError(f"level {level} is not reached while {REQUESTS} requests decode: {status}")
    what = f"{turn}, to level {level}"
    bench.figure(f"{what}: transition under load", "ms", found["transition_s"] * 1e3)
    quiet = bench.figure(f"{what}: step before", "ms", [s * 1e3 for s in found["before_s"]])
    if found["beside_s"]:
        beside = bench.figure(f"{what}: step beside", "ms", [s * 1e3 for s in found["beside_s"]])
        ratio = beside.p99 / quiet.median
        if not bench.dry:
            detail = f"{ratio:.2f}, longest {beside.most:.1f} ms"
            bench.expect(f"{what}: p99 step within 1.2 medians", ratio <= 1.2, detail)
    bench.figure(f"{what}: step after", "ms", [s * 1e3 for s in found["after_s"]])
    return status
