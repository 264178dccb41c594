"""vLLM's operators for quantized linears on NVIDIA GPUs, as far as our kernels call them, in torch on any device.

For dry runs and tests: the schemas are those of vLLM's csrc/libtorch_stable (0.32 and 0.33), the operators refuse what
the real ones refuse, and the layouts of weights that only the real ones know are others. They prove that a call is made
as it must be, and nothing about a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quant_layers import Kernel
from quant_layers.formats.packing import _from_words, _to_words
from quant_layers.kernels.cpu_linears import UINT4_ID, UINT8B128_ID
from quant_layers.kernels.marlin import unpack_w4_marlin, unpack_w8_marlin

_NAMESPACE = "morphserve_stand_in"
_OPS: Any = torch.ops  # untyped, like the libraries
_LIBRARIES: Any = torch.library
_BLOCK_N, _BLOCK_K = 128, 64  # of Machete
SCHEMAS = {
    "marlin_gemm": "(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, Tensor b_scales, "
    "Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor workspace, int b_type_id, SymInt size_m, "
    "SymInt size_n, SymInt size_k, bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float) -> Tensor",
    "machete_prepack_B": "(Tensor B, ScalarType a_type, int b_type, ScalarType? group_scales_type) -> Tensor",
    "machete_mm": "(Tensor A, Tensor B, int b_type, ScalarType? out_type, Tensor? group_scales, Tensor? group_zeros, "
    "int? group_size, Tensor? channel_scales, Tensor? token_scales, str? schedule) -> Tensor",
    "cutlass_scaled_mm": "(Tensor(a!) out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()",
    "dynamic_per_token_scaled_fp8_quant": "(Tensor(a!) result, Tensor input, Tensor(b!) scale, Tensor? scale_ub) -> ()",
}


class Refused(ValueError):
    """What the real operator refuses, or would misread."""


def _check(holds: bool, words: str) -> None:
    if not holds:
        raise Refused(words)


def marlin_meaning(weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """What Marlin's tensors mean, [N, K]. By our own reading of the layout: who checks that puts another here."""
    if zero is None:
        return unpack_w8_marlin({"weight": weight, "scale": scale}).dequantize()
    return unpack_w4_marlin({"weight": weight, "scale": scale, "zero": zero}).dequantize()


def _marlin_gemm(
    a: Tensor, c: Tensor | None, weight: Tensor, bias: Tensor | None, scale: Tensor, a_scale: Tensor | None,
    global_scale: Tensor | None, zero: Tensor | None, workspace: Tensor, type_id: int, m: int, n: int, k: int,
    atomic: bool, fp32_reduce: bool, float_zero: bool,
) -> Tensor:  # fmt: skip
    zero = None if zero is None or zero.shape[-1] == 0 else zero
    _check(type_id in (UINT4_ID, UINT8B128_ID), f"type {type_id}")
    _check((zero is not None) == (type_id == UINT4_ID), "zero points belong to uint4 alone")
    _check(a.shape == (m, k) and a.stride() == (k, 1), f"a is {tuple(a.shape)}, told are {m} x {k}")
    _check(n % 64 == 0 and k % 128 == 0 and m > 0, f"[{m}, {n}, {k}]")
    words = 2 if type_id == UINT4_ID else 4
    _check(weight.shape == (k // 16, words * n) and weight.dtype == torch.int32, f"weight {tuple(weight.shape)}")
    _check(weight.is_contiguous() and scale.is_contiguous(), "weights or scales are strided")
    _check(scale.shape[1:] == (n,) and scale.dtype == a.dtype, f"scales {tuple(scale.shape)} {scale.dtype}")
    _check(len(scale) == 1 or k // len(scale) in (32, 64, 128), f"{len(scale)} groups")
    if zero is not None:
        _check(zero.shape == (len(scale), n // 8) and zero.dtype == torch.int32, f"zero points {tuple(zero.shape)}")
    _check(workspace.dtype == torch.int32 and not workspace.any(), "locks are not zero")
    _check(c is None and bias is None and a_scale is None and global_scale is None, "not what this stand-in computes")
    _check(not atomic and fp32_reduce and not float_zero, "not what this stand-in computes")
    return (a.float() @ marlin_meaning(weight, scale, zero).float().t()).to(a.dtype)


@cache
def _order() -> Tensor:
    """int64 [8192]: some order of a block's weights."""
    size = _BLOCK_N * _BLOCK_K
    return (torch.arange(size) * 2731 + 17) % size


def _prepack(b: Tensor, a_type: torch.dtype, type_id: int, scale_type: torch.dtype | None) -> Tensor:
    _check(type_id == UINT4_ID and a_type == scale_type, f"type {type_id}, {a_type}, {scale_type}")
    _check(b.dtype == torch.int32 and b.dim() == 2 and b.stride(0) == 1, f"B {b.dtype} {b.stride()}, column by column")
    k, n = b.shape[0] * 8, b.shape[1]
    _check(n % _BLOCK_N == 0 and k % _BLOCK_K == 0, f"[{n}, {k}] is not of whole blocks")
    blocks = _from_words(b.t()).view(n // _BLOCK_N, _BLOCK_N, k // _BLOCK_K, _BLOCK_K).permute(2, 0, 1, 3)
    return _to_words(blocks.reshape(-1, len(_order()))[:, _order().to(b.device)]).view(k // 8, n)


def _unprepack(packed: Tensor) -> Tensor:
    """uint8 [N, K]."""
    k, n = packed.shape[0] * 8, packed.shape[1]
    blocks = _from_words(packed.reshape(-1, len(_order()) // 8))[:, _order().argsort().to(packed.device)]
    return blocks.view(k // _BLOCK_K, n // _BLOCK_N, _BLOCK_N, _BLOCK_K).permute(1, 2, 0, 3).reshape(n, k)


def _machete_mm(
    a: Tensor, b: Tensor, type_id: int, out_type: torch.dtype | None, scale: Tensor | None, zero: Tensor | None,
    group_size: int | None, channel_scale: Tensor | None, token_scale: Tensor | None, schedule: str | None,
) -> Tensor:  # fmt: skip
    _check(type_id == UINT4_ID and scale is not None and zero is not None, "not what this stand-in computes")
    assert scale is not None and zero is not None
    _check(out_type is None and channel_scale is None and token_scale is None and schedule is None, "likewise")
    k, n = b.shape[0] * 8, b.shape[1]
    _check(a.shape[1] == k and a.is_contiguous() and b.is_contiguous(), f"A {tuple(a.shape)}")
    _check(group_size in (64, 128) or group_size == -1, f"group size {group_size}")
    groups = 1 if group_size == -1 else k // (group_size or k)
    _check(scale.shape == (groups, n) and scale.shape == zero.shape, f"scales {tuple(scale.shape)}")
    _check(scale.stride() == zero.stride() == (n, 1), "scales and zeros must have the same layout")
    _check(scale.dtype == a.dtype and zero.dtype == a.dtype, f"scales are {scale.dtype}, zeros {zero.dtype}")
    q = _unprepack(b).to(a.dtype).view(n, groups, -1)
    weight = q * scale.t()[..., None] + zero.t()[..., None]  # each rounded to the activations' dtype
    return (a.float() @ weight.view(n, k).float().t()).to(a.dtype)


def _scaled_mm(out: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None) -> None:
    _check(a.dtype == b.dtype == torch.float8_e4m3fn, f"{a.dtype} x {b.dtype}")
    _check(a.is_contiguous() and b.stride(0) == 1, "not row by row times column by column")
    _check(a_scale.shape == (len(a), 1) and b_scale.numel() == b.shape[1], "scales are not of rows and columns")
    total = a.float() @ b.float() * a_scale * b_scale.view(1, -1)
    out.copy_(total if bias is None else total + bias.float())


def _round_tokens(result: Tensor, x: Tensor, scale: Tensor, upper: Tensor | None) -> None:
    _check(upper is None and scale.dtype == torch.float32 and scale.shape == (len(x), 1), f"scale {tuple(scale.shape)}")
    scale.copy_((x.float().abs().amax(dim=1, keepdim=True) / 448).clamp_min(1 / (448 * 512)))
    result.copy_((x.float() / scale).clamp(-448, 448).to(result.dtype))


_BODIES: dict[str, Callable[..., Any]] = {
    "marlin_gemm": _marlin_gemm,
    "machete_prepack_B": _prepack,
    "machete_mm": _machete_mm,
    "cutlass_scaled_mm": _scaled_mm,
    "dynamic_per_token_scaled_fp8_quant": _round_tokens,
}


@cache
def _library() -> Any:
    """The operators, under a name of their own: torch checks each call against the schema."""
    library = _LIBRARIES.Library(_NAMESPACE, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, _BODIES[name], "CompositeExplicitAutograd")
    return library


class _Operators:
    """`torch.ops._C` with the stand-ins in place of what has their names."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(_OPS, _NAMESPACE) if name in SCHEMAS else self._own, name)


@contextmanager
def stand_in_operators() -> Iterator[None]:
    """Inside, `torch.ops._C` has these operators."""
    _library()
    own = _OPS._C
    _OPS._C = _Operators(own)
    try:
        yield
    finally:
        _OPS._C = own


def on_any_device(make: type[Kernel]) -> type[Kernel]:
    """The kernel without its conditions on the device: for stand-in operators."""
    return type(f"{make.__name__}OnAnyDevice", (make,), {"packs_on": "", "_no_device": lambda self: ""})
