"""T8: stock vLLM on this machine: does it start, in which mode, how fast does it decode, and what if in pieces?"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from morphserve.tools.gpucheck.bench import Bench, OutOfTime, Skip
from morphserve.tools.gpucheck.engines import STAND_IN, VLLM_ENGINE, EngineError, EngineProcess, settings, write_model

REQUESTS, PROMPT_TOKENS = 32, 64
_START_S = 60.0  # a model is not begun with less
_KV_BYTES = 4 << 30
_FREE = (32 << 30, 0.4)  # bytes and share of the device: the lesser is free when an engine starts
_PAIRS = 6
# Of the graphs that there are at formats between two levels, at best: of pieces, where all have one.
_PIECES = {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}


def run(bench: Bench) -> None:
    """See the module."""
    factory = engine_factory(bench)
    with tempfile.TemporaryDirectory(prefix="gpu_check_models_") as directory:
        done = 0
        for name in ("small", "8B shape"):  # the small one first: it tells whether the other is worth its start
            if bench.left_s < bench.pick(_START_S, 0):
                left = f"{bench.left_s:.0f} s are left, its start needs {_START_S:.0f}"
                bench.expect(f"{name}: measured", False, left)
                continue
            try:
                _one_model(bench, factory, name, write_model(Path(directory), name))
            except OutOfTime as e:
                if not done:
                    raise
                bench.expect(f"{name}: measured", False, str(e))
            done += 1
        bench.require("a model was tried", done > 0)


def engine_factory(bench: Bench) -> str:
    """Return which engine this run uses.

    Raises:
        Skip: vLLM is not installed, or does not import.
    """
    if bench.dry:
        bench.note("a stand-in in place of vLLM")
        return STAND_IN
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vllm is not installed here: install it, or unpack it on an exported PYTHONPATH")
    return VLLM_ENGINE


def _one_model(bench: Bench, factory: str, name: str, model: Path) -> None:
    plain = settings(model, _KV_BYTES, *_FREE) | {"in_process": True}
    try:
        with EngineProcess(factory, plain) as engine:
            bench.figure(f"{name}: start", "s", engine.wait_ready(bench.left_s))
            bench.note(f"{name}: {engine.ask('describe', timeout_s=30)}")
            output_tokens = bench.pick(128, 4)
            rates, first, same, repeats = [], None, True, 0
            while repeats < 3 or (repeats < bench.pick(8, 3) and bench.left_s > 0.4 * bench.budget_s):
                rate, tokens = throughput(engine, output_tokens, bench.left_s)
                first = first or tokens
                same = same and tokens == first
                rates.append(rate)
                repeats += 1
            bench.figure(f"{name}: decode, {REQUESTS} requests", "tokens/s", rates[1:])  # the first warms up
            bench.require(f"{name}: starts and answers", True, f"{repeats} times {REQUESTS} x {output_tokens} tokens")
            # Requests reach the engine one by one, so batches differ from run to run, and with them the rounding.
            bench.expect(f"{name}: greedy tokens repeat", same, f"{repeats} runs")
            if name != "small":
                _in_pieces(bench, name, engine, lambda: EngineProcess(factory, plain | _PIECES))
    except EngineError as e:
        bench.require(f"{name}: starts and answers", False, str(e))


def _in_pieces(bench: Bench, name: str, whole: EngineProcess, begin: Callable[[], EngineProcess]) -> None:
    """Compare with an engine that has graphs of pieces alone, if there is time to start one."""
    measured = f"{name}, in pieces: measured"
    if bench.left_s < bench.pick(_START_S, 0):
        return bench.expect(measured, False, f"{bench.left_s:.0f} s are left, its start needs {_START_S:.0f}")
    with begin() as pieces:
        try:
            pieces.wait_ready(bench.left_s)
            bench.note(f"{name}, in pieces: {pieces.ask('describe', timeout_s=30)}")
        except (EngineError, OutOfTime) as e:
            return bench.expect(measured, False, str(e))
        _compare_steps(bench, name, whole, pieces)


def _compare_steps(bench: Bench, name: str, whole: EngineProcess, pieces: EngineProcess) -> None:
    """Measure decode steps in one graph and in graphs of pieces, in turn."""
    num_steps, ratios = bench.pick(128, 4), []
    took: dict[str, list[float]] = {}
    for pair in range(_PAIRS + 1):
        order = (("whole steps", whole), ("pieces", pieces))
        medians = {}
        for what, engine in order if pair % 2 else order[::-1]:
            steps = engine.ask("steps", REQUESTS, PROMPT_TOKENS, num_steps, timeout_s=bench.left_s)
            medians[what] = statistics.median(steps)
            took.setdefault(what, []).extend(steps if pair else ())
        if pair:  # the first warms up
            ratios.append(medians["pieces"] / medians["whole steps"])
    for what, steps in took.items():
        bench.figure(f"{name}: decode step, graphs of {what}", "ms", [s * 1e3 for s in steps])
    bench.figure(f"{name}: step in pieces over one in whole, medians of neighbouring runs", "ratio", ratios)


def throughput(engine: EngineProcess, output_tokens: int, timeout_s: float) -> tuple[float, list[list[int]]]:
    """Output tokens per second of one batch of requests, prefill included, and the tokens.

    Raises:
        EngineError: it failed, or gave fewer tokens than asked for.
    """
    start = time.perf_counter()
    tokens = engine.ask("generate", REQUESTS, PROMPT_TOKENS, output_tokens, timeout_s=timeout_s)
    seconds = time.perf_counter() - start
    if [len(row) for row in tokens] != [output_tokens] * REQUESTS:
        raise EngineError(f"generate: {sum(map(len, tokens))} tokens, {REQUESTS * output_tokens} were asked for")
    return REQUESTS * output_tokens / seconds, tokens
