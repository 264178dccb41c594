"""How long do a decoder layer's linears take in each kernel, against the base that vLLM runs for the same dtype?

Builds LAYERS layers of the shapes given (SmolLM2-135M's by default), so that weights come from memory as in a model,
and runs all kernels that pass their self-test on this CPU in turn, for SECONDS per batch size. With one thread (the
default) its CPU time is taken, which what else runs on the machine changes least; with more, the clock.
MORPHSERVE_CPU_TIER=avx2 measures as on a lesser CPU.

Output columns: dtype, M (rows, so batch size), kernel, microseconds a layer (least, median), ratio of the medians and
of the least to the base's, and the interquartile range of the kernel's times over their median.
Last stdout line: one JSON document.

    MORPHSERVE_CPU_TIER=avx2 python scripts/bench_kernels.py --dtypes float32 --rows 1 8 32
    python scripts/bench_kernels.py --shapes 4096x14336 --layers 1 --rows 1 8 32
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from morphserve.tools.command import command_parser, finish, say

Linear = Callable[[Tensor], Tensor]

_SMOLLM2 = ("960x576", "576x576", "3072x576", "576x1536")
_MIN_REPEATS = 7


def main(argv: list[str] | None = None) -> int:
    args = _parsed(argv)
    torch.set_num_threads(args.threads)
    import vllm._custom_ops  # noqa: F401  # loads the build of vLLM's extension that fits this CPU

    from quant_layers.kernels import int16

    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in args.shapes)]
    weights = [[_weight(shape, 100 * layer + i) for i, shape in enumerate(shapes)] for layer in range(args.layers)]
    results: list[dict[str, Any]] = []
    for name in args.dtypes:
        dtype = getattr(torch, name)
        stacks = _stacks(weights, dtype, args)
        for rows in args.rows:
            inputs = [torch.randn(rows, k, generator=torch.Generator().manual_seed(k)).to(dtype) for _, k in shapes]
            times = _interleaved(stacks, inputs, args)
            for row in _compared(times):
                results.append({"dtype": name, "rows": rows, **row})
                say(
                    f"{name:9} M {rows:4}  {row['kernel']:12} {row['least_us']:9.0f} {row['median_us']:9.0f}"
                    f"  x{row['ratio']:.2f} x{row['ratio_of_least']:.2f}  +-{row['spread']:.2f}"
                )
        del stacks
    return finish({
        "cpu": torch.cpu.get_capabilities().get("cpu_name"), "tier": int16.tier(), "threads": args.threads,
        "shapes": args.shapes, "layers": args.layers, "results": results,
    })  # fmt: skip


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--formats", nargs="+", default=["w8", "w4"])
    parser.add_argument("--kernels", nargs="+", help="only these; by default each that passes its self-test")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--shapes", nargs="+", default=list(_SMOLLM2), help="NxK of a layer's linears")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    return parser.parse_args(argv)


def _weight(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05 + 0.01


def _stacks(weights: list[list[Tensor]], dtype: torch.dtype, args: argparse.Namespace) -> dict[str, list[list[Linear]]]:
    """Kernel name |-> its linears, by layer; `base` is vLLM's."""
    from quant_layers import CANDIDATES, check_kernel

    stacks = {"base": [[_base(weight.to(dtype)) for weight in layer] for layer in weights]}
    for make in CANDIDATES:
        if make.format not in args.formats or (args.kernels and make.name not in args.kernels):
            continue
        kernel = make(dtype)  # type: ignore[call-arg]
        if check_kernel(kernel).ok:
            stacks[make.name] = [[kernel.build(kernel.pack(weight), None) for weight in layer] for layer in weights]
    return stacks


def _base(weight: Tensor) -> Linear:
    """Return the linear as vLLM prepares it at load."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    return lambda x: layer.cpu_linear(x, layer.weight, None)


def _interleaved(
    stacks: dict[str, list[list[Linear]]], inputs: list[Tensor], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Kernel name |-> microseconds a layer, once each turn; the first turn warms up."""
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in stacks}
    end = time.perf_counter() + args.seconds
    while len(times["base"]) <= _MIN_REPEATS or time.perf_counter() < end:
        for name, layers in stacks.items():
            start = clock()
            for layer in layers:
                for linear, x in zip(layer, inputs, strict=True):
                    linear(x)
            times[name].append(1e6 * (clock() - start) / len(layers))
    return {name: values[1:] for name, values in times.items()}


def _compared(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    base, least = statistics.median(times["base"]), min(times["base"])
    rows = []
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        rows.append(
            {
                "kernel": name,
                "least_us": round(min(values), 1),
                "median_us": round(median, 1),
                "ratio": round(median / base, 3),
                "ratio_of_least": round(min(values) / least, 3),
                "spread": round((high - low) / median, 3),
                "repeats": len(values),
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
