"""Our kernels on the operators of the installed vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

ops = pytest.importorskip("vllm._custom_ops")
pytest.importorskip("vllm._C")

from quant_layers import (  # noqa: E402
    BASE,
    CANDIDATES,
    Kernel,
    LayerSwapper,
    LinearImpl,
    LinearSlot,
    QuantW4,
    VariantStore,
    choose,
    probe,
    quantize_w4,
    quantize_w8,
)
from quant_layers.kernels import W4A8Vnni, W8A8Onednn, W8A8Vnni  # noqa: E402
from quant_layers.packing import pack_w4_vnni, pack_w8_vnni  # noqa: E402

_SHAPES = {
    "qkv_proj": (960, 576),
    "o_proj": (576, 576),
    "gate_up_proj": (3072, 576),
    "down_proj": (576, 1536),
}
_VNNI = not W8A8Vnni().unavailable()
needs_vnni = pytest.mark.skipif(not _VNNI, reason=f"VNNI kernels: {W8A8Vnni().unavailable()}")


def _weight(shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.05 + 0.01).bfloat16()


@pytest.mark.parametrize("make", CANDIDATES, ids=lambda make: make.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_available_kernel_passes(make: Callable[[torch.dtype], Kernel], dtype: torch.dtype) -> None:
    """Guards against a vLLM whose operators changed layout or meaning under the same name."""
    kernel = make(dtype)
    if why := kernel.unavailable():
        pytest.skip(why)
    report = probe(dtype)[kernel.name]
    assert report.ok, report.reason


@needs_vnni
def test_the_fast_kernels_are_chosen_for_bf16_and_fp16_falls_back() -> None:
    """Guards against silently serving the slow fall-backs, and fp16 reaching an operator that aborts."""
    assert choose("w8", torch.bfloat16).name == "w8a8_vnni"
    assert choose("w4", torch.bfloat16).name == "w4a8_vnni"
    assert choose("w8", torch.float16).name == "w8a8_onednn"
    refused = probe(torch.float32)
    assert not any(report.ok for report in refused.values())
    assert all("float32" in report.reason for report in refused.values())


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


@needs_vnni
def test_two_int8_kernels_agree() -> None:
    """Guards against a fall-back that serves other tokens than the kernel it stands in for."""
    x = torch.randn(17, 576, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight, bias = (
        _weight((960, 576)),
        torch.randn(960, generator=torch.Generator().manual_seed(2)).bfloat16(),
    )
    outs = [k.build(k.pack(weight), bias)(x).float() for k in (W8A8Vnni(), W8A8Onednn())]
    assert (outs[0] - outs[1]).abs().max() <= 2**-6 * outs[0].abs().max()


@pytest.mark.parametrize("make", CANDIDATES, ids=lambda make: make.name)
def test_edge_batches(make: Callable[[torch.dtype], Kernel]) -> None:
    """Guards against the operators' division by zero on an empty batch, and views read as if dense."""
    kernel = make(torch.bfloat16)
    if why := kernel.unavailable():
        pytest.skip(why)
    impl = kernel.build(kernel.pack(_weight((64, 96))), None)
    assert impl(torch.empty(0, 96, dtype=torch.bfloat16)).shape == (0, 64)
    assert impl(torch.empty(2, 0, 96, dtype=torch.bfloat16)).shape == (2, 0, 64)
    wide = torch.randn(5, 192, generator=torch.Generator().manual_seed(3)).bfloat16()
    for view in (wide[:, ::2], wide[:, 96:], wide.t()[:96].t()):
        assert torch.equal(impl(view), impl(view.contiguous()))
    assert impl(wide[0, :96]).shape == (64,)
    assert not impl(torch.zeros(3, 96, dtype=torch.bfloat16)).any()


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


class _OnednnBase:
    """vLLM's own bf16 linear on CPU."""

    def __init__(self, weight: Tensor) -> None:
        self.handler = ops.create_onednn_mm(weight.t(), 32)
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = ops.onednn_mm(self.handler, x, None)
        return out


def test_a_layer_goes_out_and_comes_back_bit_identical(tmp_path: Path) -> None:
    """Guards against a restored layer that answers differently: greedy tokens would change."""
    kernels = {format: choose(format) for format in ("w8", "w4")}
    store = VariantStore.open(tmp_path, "fp", {format: kernel.name for format, kernel in kernels.items()})
    base = {name: {"weight": _weight(shape, seed)} for seed, (name, shape) in enumerate(_SHAPES.items())}
    store.write(0, BASE, base)
    for format, kernel in kernels.items():
        store.write(0, format, {n: kernel.pack(t["weight"]) for n, t in base.items()}, kernel.name)

    def build_base(layer: int, name: str, tensors: Mapping[str, Tensor]) -> LinearImpl:
        return _OnednnBase(tensors["weight"])

    slots = {0: {n: LinearSlot(n, build_base(0, n, t)) for n, t in base.items()}}
    swapper = LayerSwapper(slots, store, kernels, build_base)
    generator = torch.Generator().manual_seed(9)
    inputs = {n: torch.randn(17, k, generator=generator).bfloat16() for n, (_, k) in _SHAPES.items()}

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


def test_w4_takes_a_third_of_the_base(tmp_path: Path) -> None:
    """Guards against padding or metadata that would eat what a swap is meant to free."""
    kernel = choose("w4")
    for shape in _SHAPES.values():
        base = _weight(shape)
        packed = sum(t.nbytes for t in kernel.pack(base).values())
        assert packed < 0.34 * base.nbytes


@needs_vnni
def test_w4_runs_with_the_smaller_group() -> None:
    """Guards against input sizes that only 32 divides, where the block layout differs."""
    kernel = W4A8Vnni()
    weight = _weight((64, 96))
    tensors = kernel.pack(weight)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(4)).bfloat16()
    exact = x.double() @ kernel.reference(tensors).double().t()
    assert (kernel.build(tensors, None)(x).double() - exact).abs().max() < 0.02 * exact.abs().max()
