"""How long the linears of one decoder layer take in each format here: measured once, kept beside the variants.

A ladder's policy must know where a deeper level's steps are slower: which format is faster depends on the CPU, on the
dtype of activations and on the batch. The layer is timed alone, with its weights warm in the caches, so a lone
request's gain from smaller weights is understated; from a few sequences on the arithmetic counts. It is timed on one
thread: where something else has a core, a parallel region waits for its last thread, and what is counted then is the
number of regions (31 ms for every linear of either dtype, seen on two busy cores).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from morphserve import cpu_tier
from morphserve.control import TIMED_BATCHES, LayerTimes
from morphserve.files import write_whole
from policies import BASE_FORMAT
from quant_layers import HALVES, LinearImpl, half_of

logger = logging.getLogger("vllm.morphserve")

_FILE = "layer_times.json"
_MIN_ROUNDS, _MAX_ROUNDS = 5, 30
_BUDGET_S = 0.2  # of a batch: more rounds only while they are that cheap
# Torch's own. In a CPU worker vLLM has put a function that only warns in the place of torch.set_num_threads, so that
# nobody undoes its binding of threads to cores; we give back the number that it chose, on the same threads.
_set_num_threads = torch._C.set_num_threads


@dataclass(frozen=True, slots=True)
class TimedLayer:
    """One decoder layer in several formats.

    Attributes:
        formats: format |-> linear's name inside the layer |-> the linear. None that will serve: oneDNN keeps a matmul
            for each number of rows, made for as many threads as there were at its first call.
        num_inputs: linear's name |-> K.
        dtype: of activations.
    """

    formats: Mapping[str, Mapping[str, LinearImpl]]
    num_inputs: Mapping[str, int]
    dtype: torch.dtype


def known_or_measured(
    directory: Path, dtype: torch.dtype, kernels: Mapping[str, str], build: Callable[[], TimedLayer]
) -> LayerTimes:
    """Seconds from the store's directory, or measured and written there.

    Args:
        directory: of this rank's store.
        dtype: of activations.
        kernels: format |-> name of the kernel that runs it.
        build: called where nothing is known.
    """
    conditions = _conditions(dtype, kernels)
    stored = _read(directory / _FILE)
    if (known := stored.get(conditions)) is not None and set(known) == {BASE_FORMAT, *kernels}:
        return known
    times = time_layer(build())
    logger.info("morphserve: a layer's linears, %s activations, over level 0's: %s", dtype, describe(times))
    _write(directory / _FILE, {**stored, conditions: times})
    return times


def time_layer(layer: TimedLayer) -> LayerTimes:
    """Least seconds of each format on one thread, for each of TIMED_BATCHES: (attention, MLP). Formats take turns."""
    threads = torch.get_num_threads()
    _set_num_threads(1)
    try:
        return _time_layer(layer)
    finally:
        _set_num_threads(threads)


def _time_layer(layer: TimedLayer) -> LayerTimes:
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[tuple[float, float]]] = {fmt: [] for fmt in layer.formats}
    for batch in TIMED_BATCHES:
        inputs = {
            name: torch.randn(batch, k, generator=generator).to(layer.dtype) for name, k in layer.num_inputs.items()
        }
        best = {fmt: [math.inf] * len(HALVES) for fmt in layer.formats}
        start, rounds = time.perf_counter(), 0
        with torch.inference_mode():
            while rounds < _MIN_ROUNDS or (rounds < _MAX_ROUNDS and time.perf_counter() - start < _BUDGET_S):
                rounds += 1
                for fmt, linears in layer.formats.items():
                    best[fmt] = [min(pair) for pair in zip(best[fmt], _time_halves(linears, inputs), strict=True)]
        for fmt, (attention, mlp) in best.items():
            found[fmt].append((attention, mlp))
    return {fmt: tuple(times) for fmt, times in found.items()}


def factors(times: LayerTimes) -> dict[str, tuple[float, ...]]:
    """Format |-> what it takes over level 0, one a batch of TIMED_BATCHES."""
    base = [sum(halves) for halves in times[BASE_FORMAT]]
    return {
        fmt: tuple(round(sum(halves) / whole, 3) for halves, whole in zip(rows, base, strict=True))
        for fmt, rows in times.items()
        if fmt != BASE_FORMAT
    }


def describe(times: LayerTimes) -> str:
    """Put the factors into words."""
    batches = ", ".join(map(str, TIMED_BATCHES))
    shown = (f"{fmt} {', '.join(f'{x:.2f}' for x in row)}" for fmt, row in factors(times).items())
    return f"{'; '.join(shown)} (batches of {batches})"


def _time_halves(linears: Mapping[str, LinearImpl], inputs: Mapping[str, torch.Tensor]) -> list[float]:
    """Seconds of attention and of MLP, 0 where the layer has none."""
    seconds = []
    for half in HALVES:
        start = time.perf_counter()
        for name, linear in linears.items():
            if half_of(name) == half:
                linear(inputs[name])
        seconds.append(time.perf_counter() - start)
    return seconds


def _conditions(dtype: torch.dtype, kernels: Mapping[str, str]) -> str:
    """Return what the figures depend on, besides the weights' shapes."""
    import vllm  # there is one where layers are served; who only asks for speeds may have none

    return json.dumps(
        {
            "dtype": str(dtype),
            "kernels": dict(kernels),
            "tier": cpu_tier.tier(),
            "cpu": cpu_tier.cpu_name(),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
        },
        sort_keys=True,
    )


def _read(file: Path) -> dict[str, LayerTimes]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return {
            key: {fmt: _checked(rows) for fmt, rows in times.items()} for key, times in stored.items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # absent or damaged: measured again


def _checked(rows: list[list[float]]) -> tuple[tuple[float, float], ...]:
    found = tuple((float(attention), float(mlp)) for attention, mlp in rows)
    if len(found) != len(TIMED_BATCHES) or not all(0 < sum(row) < math.inf for row in found):
        raise ValueError(f"{rows} are no times of batches {TIMED_BATCHES}")
    return found


def _write(file: Path, figures: Mapping[str, LayerTimes]) -> None:
    try:
        write_whole(file, json.dumps(figures, indent=1))
    except OSError as e:
        logger.warning("morphserve: %s cannot be kept (%s); it is measured again at the next start", file, e)
