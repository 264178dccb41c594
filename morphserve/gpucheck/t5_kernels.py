"""T5: the kernels of the quantized formats against bf16 cuBLAS, on the four linears of a Llama-8B layer.

Each point is a graph of calls that go round several copies of the weight, so that none is read from the cache; base and
quantized graphs are replayed in turn. What is replayed is what a decode step would run: no launch from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from morphserve.gpucheck.bench import Bench
from morphserve.gpucheck.device import MIB, Mark, Work, capture, graph_pool, random_weight, require_device, synchronize
from quant_layers import CANDIDATES, Kernel, LinearImpl, check_kernel

SHAPES: Mapping[str, tuple[int, int]] = {  # [N, K]
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
KERNELS = ("w4a16_triton", "fp8_torch")
# Relative to the norm of the exact product with the weight that the kernel means: bf16 rounding of weights and outputs,
# and for fp8 that of activations, to three bits of mantissa.
LARGEST_ERROR = {"w4a16_triton": 0.01, "fp8_torch": 0.05}
_DRY_SHAPES: Mapping[str, tuple[int, int]] = {"small": (32, 64)}
_CACHE_BYTES = 160 * MIB  # more than twice the L2 of an H200: what goes round it comes from memory
_MAX_COPIES = 16


def run(bench: Bench) -> None:
    """See the module."""
    require_device(bench)
    kernels = _usable(bench)
    shapes = bench.pick(SHAPES, _DRY_SHAPES)
    rows = bench.pick(ROWS, (1, 3))
    for name, (n, k) in shapes.items():
        _check_error(bench, kernels, name, n, k, rows[-1])
    points = [(name, m) for name in shapes for m in rows]
    for number, (name, m) in enumerate(points):
        if bench.left_s < 0.05 * bench.budget_s:
            bench.note(f"no time for {len(points) - number} of {len(points)} points: from {name}, M={m} on")
            bench.expect("all points measured", False, f"{number} of {len(points)}")
            break
        _time_point(bench, kernels, name, *shapes[name], m)


def _usable(bench: Bench) -> list[Kernel]:
    """Those that pass the self-test that serving relies on."""
    usable = []
    for make in CANDIDATES:
        if make.name not in KERNELS:
            continue
        kernel: Any = make  # a Protocol says nothing of how it is made
        kernel = kernel(torch.bfloat16)
        if reason := kernel.unavailable():
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


def _time_point(bench: Bench, kernels: Sequence[Kernel], name: str, n: int, k: int, m: int) -> None:
    x = random_weight(m, k, bench.device, seed=m)
    weight = random_weight(n, k, bench.device, seed=n + k)
    pool = graph_pool(bench.device)
    replays: dict[str, tuple[Work, int]] = {}
    weights = [weight.clone() for _ in range(_copies(bench, weight.nbytes))]
    calls: list[Callable[[], object]] = [_linear_call(x, w) for w in weights]
    replays["bf16"] = _graph_of(bench, calls, pool)
    for kernel in kernels:
        tensors = kernel.pack(weight)
        num_bytes = sum(t.nbytes for t in tensors.values())
        copies = range(_copies(bench, num_bytes))
        impls = [kernel.build({key: _clone(t) for key, t in tensors.items()}, None) for _ in copies]
        replays[kernel.name] = _graph_of(bench, [_impl_call(x, impl) for impl in impls], pool)
    times = _in_turn(bench, replays)
    for label, values in times.items():
        bench.figure(f"{label} {name} M={m}", "us a call", values)
        if label != "bf16":
            ratios = [ours / base for ours, base in zip(values, times["bf16"], strict=True)]
            bench.figure(f"{label} {name} M={m}: time over bf16", "ratio", ratios)


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.preserve_format)


def _linear_call(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.nn.functional.linear(x, weight)


def _impl_call(x: torch.Tensor, impl: LinearImpl) -> Callable[[], object]:
    return lambda: impl(x)


def _graph_of(bench: Bench, calls: Sequence[Callable[[], object]], pool: Any) -> tuple[Work, int]:
    """What replays the calls, round and round until a graph's own launch is a small share, and how many there are."""
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
