"""A W4A16 matmul for GPUs that none of the compiled kernels knows. Portable rather than fast.

Weights lie eight to an int32 along K, as GPTQ has them; they are dequantized tile by tile on their way into the
matrix units, so only 4 bits a weight cross the memory bus.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

_WEIGHTS_PER_WORD = tl.constexpr(8)
_MAX_BLOCK_M = 64
_MIN_DOT = 16  # the matrix units want at least so many rows and columns
_BLOCK_N = 64
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # its dot multiplies the bit patterns of bf16


@triton.jit
def _w4a16_kernel(
    x_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, m, n, k, stride_x,
    group_size: tl.constexpr, has_bias: tl.constexpr, widen: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * block_m + tl.arange(0, block_m)
    columns = tl.program_id(1) * block_n + tl.arange(0, block_n)
    row_mask, column_mask = rows < m, columns < n
    total = tl.zeros((block_m, block_n), dtype=tl.float32)
    for start in range(0, k, block_k):  # block_k divides the group: one scale and zero point a column
        channels = start + tl.arange(0, block_k)
        x = tl.load(x_ptr + rows[:, None] * stride_x + channels[None, :], mask=row_mask[:, None], other=0.0)
        words = tl.load(
            weight_ptr + (channels // _WEIGHTS_PER_WORD)[:, None] * n + columns[None, :],
            mask=column_mask[None, :], other=0,
        )  # fmt: skip
        q = (words >> ((channels % _WEIGHTS_PER_WORD) * 4)[:, None]) & 15
        group = start // group_size
        scale = tl.load(scale_ptr + group * n + columns, mask=column_mask, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + group * n + columns, mask=column_mask, other=0).to(tl.float32)
        weight = (q.to(tl.float32) - zero[None, :]) * scale[None, :]
        weight = weight.to(x.dtype)
        if widen:
            total += tl.dot(x.to(tl.float32), weight.to(tl.float32))
        else:
            total = tl.dot(x, weight, total)
    if has_bias:
        total += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    where = out_ptr + rows[:, None] * n + columns[None, :]
    tl.store(where, total.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def w4a16_matmul(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x by the dequantized weight, and add bias.

    Args:
        x: [M, K], fp16 or bf16, rows contiguous.
        weight: int32 [K / 8, N].
        scale: [K / group_size, N], dtype of `x`.
        zero: uint8 [K / group_size, N].
        bias: [N] or None.

    Returns:
        [M, N] in the dtype of `x`.
    """
    m, k = x.shape
    n = weight.shape[1]
    group_size = k // scale.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    block_m = min(_MAX_BLOCK_M, max(_MIN_DOT, triton.next_power_of_2(m)))
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, _BLOCK_N))
    _w4a16_kernel[grid](
        x, weight, scale, zero, x if bias is None else bias, out, m, n, k, x.stride(0),
        group_size=group_size, has_bias=bias is not None, widen=_INTERPRETED,
        block_m=block_m, block_n=_BLOCK_N, block_k=min(group_size, 64),
    )  # fmt: skip
    return out
