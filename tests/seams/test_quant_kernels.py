"""Our kernels on the operators of the installed vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from quant_world import swapper_of
from torch import Tensor

ops = pytest.importorskip("vllm._custom_ops")  # loads the build of vLLM's extension that fits: name none

from quant_layers import (  # noqa: E402
    BASE,
    CANDIDATES,
    FORMATS,
    Kernel,
    LinearImpl,
    LinearSlot,
    QuantW4,
    VariantStore,
    check_kernel,
    choose,
    quantize_w4,
    quantize_w8,
)
from quant_layers.formats.packing import pack_w4_vnni, pack_w8_vnni  # noqa: E402
from quant_layers.kernels.cpu import W4A8Vnni, W8A8Onednn, W8A8Vnni  # noqa: E402
from quant_layers.kernels.int16 import W4Int16, W8Int16  # noqa: E402

pytestmark = pytest.mark.cpu_tier

_SHAPES = {
    "qkv_proj": (960, 576),
    "o_proj": (576, 576),
    "gate_up_proj": (3072, 576),
    "down_proj": (576, 1536),
}
_VNNI = not W8A8Vnni().unavailable()
_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
needs_vnni = pytest.mark.skipif(not _VNNI, reason=f"VNNI kernels: {W8A8Vnni().unavailable()}")


def _weight(shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.05 + 0.01).bfloat16()


def _has_any_vnni() -> bool:
    """Either encoding will do for oneDNN; our kernels and vLLM's need that of AVX-512."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_vnni") or has.get("avx_vnni"))


@pytest.mark.parametrize("make", CANDIDATES, ids=lambda make: make.name)
@_DTYPES
def test_every_available_kernel_passes(make: Callable[[torch.dtype], Kernel], dtype: torch.dtype) -> None:
    """Guards against a vLLM whose operators changed layout or meaning under the same name."""
    kernel = make(dtype)
    if why := kernel.unavailable():
        pytest.skip(why)
    report = check_kernel(kernel)
    if make is W8A8Onednn and not _has_any_vnni():  # oneDNN's sums then saturate
        assert "times what rounding explains" in report.reason
    else:
        assert report.ok, report.reason


@needs_vnni
def test_the_operators_for_bf16_instructions_are_chosen_for_bf16() -> None:
    """Guards against silently serving slower kernels where the fast ones run, and fp16 reaching one that aborts."""
    assert choose("w8", torch.bfloat16).name == "w8a8_vnni"
    assert choose("w4", torch.bfloat16).name == "w4a8_vnni"
    assert choose("w8", torch.float16).name == "w8_int16"


@_DTYPES
def test_every_dtype_has_a_compiled_kernel(dtype: torch.dtype) -> None:
    """Guards against a tier or dtype for which only plain torch is left, or nothing at all."""
    if why := W8Int16(dtype).unavailable():
        pytest.skip(why)
    for format in ("w8", "w4"):
        vnni = _VNNI and (dtype == torch.bfloat16 or (format == "w4" and dtype == torch.float16))
        expected = f"{format}a8_vnni" if vnni else f"{format}_int16"
        assert choose(format, dtype).name == expected


def test_an_opaque_slot_runs_our_operators_without_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a kind of slot that the native op does not know, or hands over in another order."""
    from morphserve.integration.worker.ops import opaque_linear

    if why := W8Int16(torch.float32).unavailable():
        pytest.skip(why)
    opaque_linear.register_op(tmp_path)
    if not opaque_linear._is_native:
        pytest.skip("the native linear cannot be built here")
    monkeypatch.setattr(opaque_linear, "_SLOTS", [])  # only the numbering: the native table grows
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(5))
    for make in (W8Int16, W4Int16):
        kernel = make(torch.float32)
        impl = kernel.build(kernel.pack(_weight((64, 96)).float()), torch.randn(64))
        expected = impl(x)
        slot = opaque_linear.OpaqueSlot("slot", impl, kernel.format, None, 96)
        opaque_linear._SLOTS.clear()  # Python could not find it any more
        for part in ((slice(None),), (slice(None), slice(1, None)), (0,), (1, 2)):
            assert torch.equal(torch.ops.morphserve.linear(x[part], slot.index, 64), expected[part])


@needs_vnni
@pytest.mark.parametrize("shape", [(32, 32), (64, 96), *_SHAPES.values()])
def test_our_int8_layout_is_the_operators_own(shape: tuple[int, int]) -> None:
    """Guards against drift between our packer and the extension's, byte for byte."""
    q = quantize_w8(_weight(shape)).q
    assert torch.equal(pack_w8_vnni(q), torch.ops._C.convert_weight_packed(q))


def _awq_words(values: Tensor) -> Tensor:
    """[R, C] 0..15 -> int32 [R, C / 8] in AWQ's nibble order, which the extension's packer takes."""
    ordered = values.long().view(values.shape[0], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
    words = (ordered << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


@needs_vnni
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("shape", [(32, 64), (96, 192), (960, 576), (576, 1536)])
def test_our_int4_layout_is_the_operators_own(shape: tuple[int, int], size: int) -> None:
    """Guards against drift in nibble order, zero points or compensation, byte for byte."""
    quant: QuantW4 = quantize_w4(_weight(shape), size)
    ours = pack_w4_vnni(quant)
    weight, zero, scale = torch.ops._C.convert_weight_packed_scale_zp(
        _awq_words(quant.q.t().contiguous()),
        _awq_words(quant.zero.t().contiguous()),
        quant.scale.t().contiguous(),
        int(ops.CPUQuantAlgo.AWQ),
    )
    assert len(set(quant.zero.flatten().tolist())) > 3  # zero points that differ, or this proves nothing
    assert torch.equal(ours["weight"], weight)
    assert torch.equal(ours["zero"], zero)
    assert torch.equal(ours["scale"], scale)


@_DTYPES
@pytest.mark.parametrize("format", ["w8", "w4"])
def test_kernels_of_a_format_agree(format: str, dtype: torch.dtype) -> None:
    """Guards against a fall-back that serves other tokens than the kernel it stands in for."""
    x = torch.randn(17, 576, generator=torch.Generator().manual_seed(1)).to(dtype)
    quant = FORMATS[format].of(_weight((960, 576)).to(dtype), torch.bfloat16)
    quant = replace(quant, scale=quant.scale.float())  # type: ignore[type-var]  # as all kernels can hold it
    bias = torch.randn(960, generator=torch.Generator().manual_seed(2)).to(dtype)
    kernels = [make(dtype) for make in CANDIDATES if make.format == format]  # type: ignore[call-arg]
    passed = [kernel for kernel in kernels if check_kernel(kernel).ok]
    assert len(passed) >= 2
    outs = [kernel.build(kernel.pack_quant(quant), bias)(x).float() for kernel in passed]
    for out in outs[1:]:  # some round activations to 8 bits
        assert (outs[0] - out).abs().max() <= 2**-5 * outs[0].abs().max()


@_DTYPES
@pytest.mark.parametrize("make", CANDIDATES, ids=lambda make: make.name)
def test_edge_batches(make: Callable[[torch.dtype], Kernel], dtype: torch.dtype) -> None:
    """Guards against the operators' division by zero on an empty batch, and views read as if dense."""
    kernel = make(dtype)
    if why := check_kernel(kernel).reason:
        pytest.skip(why)
    impl = kernel.build(kernel.pack(_weight((64, 96)).to(dtype)), None)
    assert impl(torch.empty(0, 96, dtype=dtype)).shape == (0, 64)
    assert impl(torch.empty(2, 0, 96, dtype=dtype)).shape == (2, 0, 64)
    wide = torch.randn(5, 192, generator=torch.Generator().manual_seed(3)).to(dtype)
    for view in (wide[:, ::2], wide[:, 96:], wide.t()[:96].t()):
        assert torch.equal(impl(view), impl(view.contiguous()))
    assert impl(wide[0, :96]).shape == (64,)
    assert not impl(torch.zeros(3, 96, dtype=dtype)).any()


def test_a_onednn_linear_gives_its_memory_back() -> None:
    """Guards against a handler that is never released: it lives outside torch's tensors."""
    kernel = W8A8Onednn()
    if why := kernel.unavailable():
        pytest.skip(why)
    impl = kernel.build(kernel.pack(_weight((64, 96))), None)
    assert impl.nbytes == 64 * 96 + 64 * 4
    release = Mock(wraps=impl._release)  # type: ignore[attr-defined]
    impl._release = release  # type: ignore[attr-defined]
    pointer = impl._handler.item()  # type: ignore[attr-defined]
    del impl
    release.assert_called_once_with(pointer)


class _Base:
    """vLLM's own linear on CPU: oneDNN's, or torch's for what that does not take."""

    def __init__(self, weight: Tensor) -> None:
        self.nbytes = weight.nbytes
        try:
            handler = ops.create_onednn_mm(weight.t(), 32)
            self.run = lambda x: ops.onednn_mm(handler, x, None)
        except RuntimeError:
            self.run = lambda x: torch.nn.functional.linear(x, weight)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.run(x)
        return out


@_DTYPES
def test_a_layer_goes_out_and_comes_back_bit_identical(tmp_path: Path, dtype: torch.dtype) -> None:
    """Guards against a restored layer that answers differently: greedy tokens would change."""
    kernels = {format: choose(format, dtype) for format in ("w8", "w4")}
    store = VariantStore.open(tmp_path, "fp", {format: kernel.name for format, kernel in kernels.items()})
    base = {name: {"weight": _weight(shape, seed).to(dtype)} for seed, (name, shape) in enumerate(_SHAPES.items())}
    store.write(0, BASE, base)
    for format, kernel in kernels.items():
        store.write(0, format, {n: kernel.pack(t["weight"]) for n, t in base.items()}, kernel.name)

    def build_base(layer: int, name: str, tensors: Mapping[str, Tensor]) -> LinearImpl:
        return _Base(tensors["weight"])

    slots = {0: {n: LinearSlot(n, build_base(0, n, t)) for n, t in base.items()}}
    swapper = swapper_of(slots, store, kernels, build_base)
    generator = torch.Generator().manual_seed(9)
    inputs = {n: torch.randn(17, k, generator=generator).to(dtype) for n, (_, k) in _SHAPES.items()}

    def outputs() -> dict[str, Tensor]:
        return {name: slot.impl(inputs[name]) for name, slot in slots[0].items()}

    before = outputs()
    for format, limit in (("w8", 0.02), ("w4", 0.15)):
        swapper.prepare({0: format})
        swapper.commit()
        for name, out in outputs().items():
            error = (out.float() - before[name].float()).norm() / before[name].float().norm()
            assert 0 < error < limit, (format, name, error)
    assert swapper.resident_bytes == store.nbytes(0, "w4")
    swapper.prepare({0: BASE})
    swapper.commit()
    for name, out in outputs().items():
        assert torch.equal(out, before[name])


@_DTYPES
def test_w4_takes_a_third_of_the_base(dtype: torch.dtype) -> None:
    """Guards against padding or metadata that would eat what a swap is meant to free."""
    kernel = choose("w4", dtype)
    for shape in _SHAPES.values():
        packed = sum(t.nbytes for t in kernel.pack(_weight(shape).to(dtype)).values())
        assert packed < 0.34 * 2 * shape[0] * shape[1]  # of a base in 16 bits


@needs_vnni
def test_w4_runs_with_the_smaller_group() -> None:
    """Guards against input sizes that only 32 divides, where the block layout differs."""
    kernel = W4A8Vnni()
    weight = _weight((64, 96))
    tensors = kernel.pack(weight)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(4)).bfloat16()
    exact = x.double() @ kernel.reference(tensors).double().t()
    assert (kernel.build(tensors, None)(x).double() - exact).abs().max() < 0.02 * exact.abs().max()
