"""T5: the kernels of the quantized formats against bf16 cuBLAS, on the four linears of a Llama-8B layer.

Each point is a graph of calls that go round several copies of the weight, so that none is read from the cache; base and
quantized graphs are replayed in turn. What is replayed is what a decode step would run: no launch from Python.
Kernels of vLLM's are measured where it is installed and the GPU suits them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.device import (
    MIB,
    Mark,
    Work,
    capture,
    graph_pool,
    random_weight,
    require_device,
    synchronize,
)
from morphserve.tools.gpucheck.mini.model import LINEARS, Shape
from quant_layers import CANDIDATES, Kernel, check_kernel

SHAPES: Mapping[str, tuple[int, int]] = {  # [N, K]
    name: Shape().linear(linear) for name, linear in zip(("qkv", "o", "gate_up", "down"), LINEARS, strict=True)
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
OF_VLLM = ("w4a16_marlin", "w8a16_marlin", "w4a16_machete", "fp8_cutlass")
KERNELS = ("w4a16_triton", "fp8_torch", *OF_VLLM)
# Relative to the norm of the exact product with the weight that the kernel means: bf16 rounding of weights and outputs,
# and for fp8 that of activations, to three bits of mantissa.
LARGEST_ERROR = {
    "w4a16_triton": 0.01,
    "w4a16_marlin": 0.01,
    "w8a16_marlin": 0.01,
    "w4a16_machete": 0.01,
    "fp8_torch": 0.05,
    "fp8_cutlass": 0.05,
}
_DRY_SHAPES: Mapping[str, tuple[int, int]] = {"small": (128, 128)}
_CACHE_BYTES = 160 * MIB  # more than twice the L2 of an H200: what goes round it comes from memory
_MAX_COPIES = 16
Linear = Callable[[torch.Tensor], torch.Tensor]
Linears = dict[str, list[Linear]]  # kernel |-> copies of one weight


def run(bench: Bench) -> None:
    """See the module."""
    require_device(bench)
    _load_operators(bench)
    kernels = _usable(bench)
    shapes = bench.pick(SHAPES, _DRY_SHAPES)
    rows = bench.pick(ROWS, (1, 3))
    for name, (n, k) in shapes.items():
        _check_error(bench, kernels, name, n, k, rows[-1])
    points = [(name, m) for name in shapes for m in rows]
    linears: Linears = {}
    for number, (name, m) in enumerate(points):
        if bench.left_s < 0.05 * bench.budget_s:
            bench.note(f"no time for {len(points) - number} of {len(points)} points: from {name}, M={m} on")
            bench.expect("all points measured", False, f"{number} of {len(points)}")
            break
        if m == rows[0]:
            linears = {}  # those of the last shape go first
            linears = _linears(bench, kernels, *shapes[name])
        _time_point(bench, linears, name, shapes[name][1], m)


def _load_operators(bench: Bench) -> None:
    """Load vLLM's, where there are any."""
    if bench.device == "cuda" and importlib.util.find_spec("vllm") is not None:
        try:
            importlib.import_module("vllm._custom_ops")
        except Exception as e:  # of any kind: what needs no vLLM is measured all the same
            bench.note(f"vLLM's operators cannot be loaded ({type(e).__name__}: {e})")


def _usable(bench: Bench) -> list[Kernel]:
    """Return those that pass the self-test that serving relies on."""
    usable = []
    for make in CANDIDATES:
        if make.name not in KERNELS:
            continue
        of_vllm = make.name in OF_VLLM
        kernel: Any = make  # the Protocol does not say how it is made
        kernel = kernel(torch.bfloat16)
        if reason := kernel.unavailable():
            if of_vllm:
                bench.expect(f"{kernel.name}: runs here", False, reason)
            else:
                bench.require(f"{kernel.name}: runs here", bench.dry, reason)
            continue
        if bench.dry and kernel.name == "w4a16_triton":
            bench.note(f"{kernel.name}: self-test left out, in the interpreter it takes a minute")
            usable.append(kernel)
            continue
        report = check_kernel(kernel, bench.device)
        bench.require(f"{kernel.name}: passes its self-test", report.ok, report.reason or f"{report.worst_error:.3f}")
        if report.ok:
            usable.append(kernel)
    return usable


def _check_error(bench: Bench, kernels: Sequence[Kernel], name: str, n: int, k: int, m: int) -> None:
    """Large products against float64."""
    weight = random_weight(n, k, bench.device, seed=n + k)
    x = random_weight(m, k, bench.device, seed=m) * k**0.5
    for kernel in kernels:
        tensors = kernel.pack(weight)
        impl = kernel.build(tensors, None)
        meaning = kernel.reference(tensors).double().t()
        errors = []
        for rows in (x[:1], x[: m // 2 + 1], x):
            exact = rows.double() @ meaning
            errors.append(float((impl(rows).double() - exact).norm() / exact.norm()))
        bench.figure(f"{kernel.name} {name}: error against float64", "of the norm", errors)
        limit = LARGEST_ERROR[kernel.name]
        bench.require(f"{kernel.name} {name}: error below {limit}", max(errors) < limit, f"{max(errors):.4f}")
    exact = x.double() @ weight.double().t()
    base = float((torch.nn.functional.linear(x, weight).double() - exact).norm() / exact.norm())
    bench.figure(f"bf16 {name}: error against float64", "of the norm", base)


def _linears(bench: Bench, kernels: Sequence[Kernel], n: int, k: int) -> Linears:
    """Pack copies of one linear by kernel, once for all batch sizes."""
    weight = random_weight(n, k, bench.device, seed=n + k)
    linears: Linears = {"bf16": [_base(weight.clone()) for _ in range(_copies(bench, weight.nbytes))]}
    for kernel in kernels:
        tensors = kernel.pack(weight)
        copies = range(_copies(bench, sum(t.nbytes for t in tensors.values())))
        linears[kernel.name] = [kernel.build({key: _clone(t) for key, t in tensors.items()}, None) for _ in copies]
    return linears


def _time_point(bench: Bench, linears: Linears, name: str, k: int, m: int) -> None:
    x = random_weight(m, k, bench.device, seed=m)
    pool = graph_pool(bench.device)
    replays = {label: _graph_of(bench, [_call(x, run) for run in runs], pool) for label, runs in linears.items()}
    times = _in_turn(bench, replays)
    for label, values in times.items():
        bench.figure(f"{label} {name} M={m}", "us a call", values)
        if label != "bf16":
            ratios = [ours / base for ours, base in zip(values, times["bf16"], strict=True)]
            bench.figure(f"{label} {name} M={m}: time over bf16", "ratio", ratios)


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.preserve_format)


def _base(weight: torch.Tensor) -> Linear:
    return lambda x: torch.nn.functional.linear(x, weight)


def _call(x: torch.Tensor, run: Linear) -> Callable[[], object]:
    return lambda: run(x)


def _graph_of(bench: Bench, calls: Sequence[Callable[[], object]], pool: Any) -> tuple[Work, int]:
    """Return what replays the calls, round and round until a graph's launch is a small share, and their number."""
    calls = list(calls) * -(-bench.pick(_MAX_COPIES, 1) // len(calls))

    def work() -> None:
        for call in calls:
            call()

    return capture(bench.device, work, pool), len(calls)


def _copies(bench: Bench, num_bytes: int) -> int:
    return bench.pick(min(_MAX_COPIES, max(2, -(-_CACHE_BYTES // num_bytes))), 2)


def _in_turn(bench: Bench, replays: Mapping[str, tuple[Work, int]]) -> dict[str, list[float]]:
    """Microseconds of one call, by kernel, over rounds in which each is replayed once."""
    times: dict[str, list[float]] = {label: [] for label in replays}
    warm_ups, rounds = bench.pick((2, 10), (0, 2))
    for turn in range(warm_ups + rounds):
        order = list(replays.items())
        for label, (replay, num_calls) in order[::-1] if turn % 2 else order:
            first = Mark(bench.device)
            replay()
            last = Mark(bench.device)
            last.wait()
            if turn >= warm_ups:
                times[label].append(last.us_since(first) / num_calls)
    synchronize(bench.device)
    return times
