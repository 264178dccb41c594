"""Runs our Triton kernel in Triton's interpreter and prints its errors as JSON: `TRITON_INTERPRET=1 triton_probe.py`.

A process of its own: Triton asks for the interpreter once, when it is imported.
"""

from __future__ import annotations

import json
import sys

import torch

from quant_layers import check_kernel, quantize_w4
from quant_layers.kernels.cpu import W4A16Triton

SHAPES = [(m, n, k, group) for m in (1, 17, 70) for n, k, group in ((32, 128, 128), (96, 64, 32), (160, 256, 64))]


class Narrow(W4A16Triton):
    """With fewer columns to prove: more of them are more programs of the same kind, and the interpreter is slow."""

    proof_shapes = ((96, 576), (96, 1536), (64, 32))


def error(m: int, n: int, k: int, group: int) -> float:
    torch.manual_seed(0)
    quant = quantize_w4(torch.randn(n, k), group, scale_dtype=torch.bfloat16)
    kernel = W4A16Triton(torch.bfloat16)
    tensors = kernel.pack_quant(quant)
    x = torch.randn(m, k).bfloat16()
    got = kernel.build(tensors, None)(x)
    # The kernel rounds each weight to bf16, as a bf16 matmul would have it.
    exact = x.double() @ kernel.reference(tensors).bfloat16().double().t()
    return float((got.double() - exact).norm() / exact.norm())


if __name__ == "__main__":
    reports = {str(d): check_kernel(Narrow(d)) for d in (torch.bfloat16, torch.float16)}
    document = {
        "self_tests": {dtype: [report.ok, report.reason] for dtype, report in reports.items()},
        "errors": {str(shape): error(*shape) for shape in SHAPES},
    }
    sys.stdout.write("\n" + json.dumps(document) + "\n")
