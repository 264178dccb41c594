"""Our packing for Marlin, and our calls, against what vLLM itself packs and calls: the kernel runs on GPUs only."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.quantization.utils.marlin_utils import (
    apply_gptq_marlin_linear,
    marlin_make_empty,
    marlin_permute_scales,
    marlin_zero_points,
    query_marlin_supported_quant_types,
)
from vllm.model_executor.layers.quantization.utils.marlin_utils_test import get_weight_perm, marlin_weights
from vllm.scalar_type import scalar_types

from quant_layers import KernelError, QuantW4, QuantW8, W4A16Marlin, W8A16Marlin, check_kernel, quantize_w4, quantize_w8
from quant_layers.kernels.cpu_linears import UINT4_ID, UINT8B128_ID
from quant_layers.kernels.marlin import pack_w4_marlin, pack_w8_marlin, unpack_w4_marlin, unpack_w8_marlin
from tests import stand_in_ops
from tests.stand_in_ops import on_any_device, stand_in_operators

pytestmark = pytest.mark.seams


def weight(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))


def quant(n: int, k: int, group_size: int) -> QuantW4:
    return quantize_w4(weight(n, k), group_size, scale_dtype=torch.bfloat16)


def quant8(n: int, k: int) -> QuantW8:
    return quantize_w8(weight(n, k), scale_dtype=torch.bfloat16)


@pytest.mark.parametrize(("n", "k", "group_size"), [(64, 256, 64), (192, 384, 128), (128, 640, 32), (64, 128, 128)])
def test_packed_as_vllm_packs(n: int, k: int, group_size: int) -> None:
    """Guards: weights, scales or zero points in another order than the kernel reads, which no CPU could tell."""
    found = quant(n, k, group_size)
    packed = pack_w4_marlin(found)
    assert torch.equal(packed["weight"], marlin_weights(found.q.t().int(), k, n, 4, get_weight_perm(4)))
    assert torch.equal(packed["scale"], marlin_permute_scales(found.scale.t().contiguous(), k, n, group_size))
    # vLLM counts the rows of zero points by the groups.
    groups = k // group_size
    assert torch.equal(packed["zero"], marlin_zero_points(found.zero.t().int().contiguous(), groups, n, 4))


@pytest.mark.parametrize(("n", "k"), [(64, 256), (192, 384), (960, 640), (64, 128)])
def test_eight_bits_packed_as_vllm_packs(n: int, k: int) -> None:
    """Guards: the same for 8 bits, where a word holds four values in another order, and values are plus 128."""
    found = quant8(n, k)
    packed = pack_w8_marlin(found)
    stored = found.q.t().int() + scalar_types.uint8b128.bias
    assert torch.equal(packed["weight"], marlin_weights(stored, k, n, 8, get_weight_perm(8)))
    assert torch.equal(packed["scale"], marlin_permute_scales(found.scale[None], k, n, -1))


@pytest.mark.parametrize(("n", "k", "group_size"), [(64, 256, 64), (192, 384, 128), (64, 128, 128)])
def test_unpacking_is_the_inverse(n: int, k: int, group_size: int) -> None:
    """Guards: a reference that means another weight than the kernel computes with."""
    found = quant(n, k, group_size)
    again = unpack_w4_marlin(pack_w4_marlin(found))
    assert torch.equal(again.q, found.q) and torch.equal(again.zero, found.zero)
    assert torch.equal(again.scale, found.scale)
    wide = quant8(n, k)
    back = unpack_w8_marlin(pack_w8_marlin(wide))
    assert torch.equal(back.q, wide.q) and back.q.dtype == torch.int8 and torch.equal(back.scale, wide.scale)


def test_the_types_are_those_vllm_names() -> None:
    """Guards: the kernel told that weights are of a type they are not."""
    assert scalar_types.uint4.id == UINT4_ID
    assert scalar_types.uint8b128.id == UINT8B128_ID


def test_what_does_not_fit_is_refused() -> None:
    """Guards: a kernel that reads beyond a weight."""
    for kernel in (W4A16Marlin(), W8A16Marlin()):
        for n, k, words in ((96, 256, "N=96"), (64, 192, "K=192 of a weight")):
            with pytest.raises(KernelError, match=words):
                kernel.check_shape(n, k)
        if not torch.cuda.is_available():
            assert kernel.unavailable() == "needs an NVIDIA GPU"
    with pytest.raises(KernelError, match="group size 256"):
        W4A16Marlin().pack_quant(quant(64, 512, 256))


def vllms_meaning(packed: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """fp32 [N, K], read with vLLM's own orders alone."""
    bits = 8 if zero is None else 4
    k, n = packed.shape[0] * 16, scale.shape[1]
    order = get_weight_perm(bits)
    values = torch.stack([packed >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)], dim=-1).view(k // 16, -1)
    tiles = torch.empty(values.numel() // len(order), len(order), dtype=torch.int32)
    tiles[:, order] = values.reshape(tiles.shape)
    q = tiles.view(k // 16, n // 16, 16, 16).permute(0, 2, 1, 3).reshape(k, n)
    place = torch.arange(n, dtype=torch.float32).repeat(len(scale), 1)
    seen = marlin_permute_scales(place, k, n, k // len(scale)).long()
    scales = torch.empty_like(scale).scatter_(1, seen, scale).float().repeat_interleave(k // len(scale), 0)
    if zero is None:
        return ((q - scalar_types.uint8b128.bias) * scales).t()
    # The 16 values of a zero point tell in which place of a row vLLM puts it.
    codes = torch.arange(n, dtype=torch.int32)
    found = torch.zeros_like(codes)
    for bit in range(0, 12, 4):
        words = marlin_zero_points((codes >> bit & 15)[None], 1, n, 4)
        found |= torch.stack([words >> shift & 15 for shift in range(0, 32, 4)], dim=-1).flatten() << bit
    points = torch.stack([zero >> shift & 15 for shift in range(0, 32, 4)], dim=-1).view(len(scale), n)
    points = torch.empty_like(points).scatter_(1, found.long().expand_as(points), points)
    return ((q - points.repeat_interleave(k // len(scale), 0)) * scales).t()


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stand_in_ops, "marlin_meaning", vllms_meaning)
    with stand_in_operators():
        yield


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("make", [W4A16Marlin, W8A16Marlin], ids=lambda make: make.name)
def test_the_self_test_passes_on_vllms_reading(make: type[W4A16Marlin | W8A16Marlin]) -> None:
    """Guards: a packer and an unpacker that agree with each other and not with vLLM."""
    report = check_kernel(on_any_device(make)(torch.bfloat16))  # type: ignore[call-arg]
    assert report.ok, report.reason


class Recorder:
    """An operator that notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.default = self

    def __call__(self, *args: object) -> Tensor:
        self.calls.append(args)
        x, n = args[0], args[11]
        assert isinstance(x, Tensor) and isinstance(n, int)
        return x.new_zeros(len(x), n)


@pytest.mark.parametrize("eight", [False, True], ids=["w4", "w8"])
def test_called_as_vllm_calls(monkeypatch: pytest.MonkeyPatch, eight: bool) -> None:
    """Guards: an argument at another place than vLLM's own wrapper, and its own linear, put it."""
    recorder = Recorder()
    monkeypatch.setattr(torch.ops._C, "marlin_gemm", recorder, raising=False)
    n, k = 192, 384
    kernel: W4A16Marlin | W8A16Marlin = W8A16Marlin() if eight else W4A16Marlin()
    kind = scalar_types.uint8b128 if eight else scalar_types.uint4
    packed = kernel.pack(weight(n, k).bfloat16())
    impl = kernel.build(packed, None)
    x = weight(5, k).bfloat16()
    impl(x)
    locks = impl._locks  # type: ignore[attr-defined]
    zero = packed.get("zero", marlin_make_empty(x.device))
    apply_gptq_marlin_linear(
        input=x, weight=packed["weight"], weight_scale=packed["scale"], weight_zp=zero, workspace=locks, wtype=kind,
        output_size_per_partition=n, input_size_per_partition=k,
    )  # fmt: skip
    ops.marlin_gemm(
        x, None, packed["weight"], None, packed["scale"], None, None, packed.get("zero"), locks, kind, 5, n, k,
        use_atomic_add=False, use_fp32_reduce=True, is_zp_float=False,
    )  # fmt: skip
    ours, linear, wrapper = recorder.calls
    for theirs in (linear, wrapper):
        assert len(ours) == len(theirs) == len(torch.ops.morphserve_stand_in.marlin_gemm.default._schema.arguments)
        for place, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if place == 7 and eight and other is not None:  # no zero points: the operator takes none and an empty one
                assert mine is None and isinstance(other, Tensor) and other.numel() == 0
            elif isinstance(mine, Tensor):
                assert isinstance(other, Tensor) and mine.data_ptr() == other.data_ptr() and mine.shape == other.shape
            else:
                assert mine == other, place


def test_the_gpus_are_those_vllm_runs_marlin_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: w8 in the default ladder of a GPU for which vLLM has no such kernel."""
    gpu = SimpleNamespace(is_cpu=lambda: False, is_xpu=lambda: False, is_rocm=lambda: False)
    monkeypatch.setattr("vllm.model_executor.layers.quantization.utils.marlin_utils.current_platform", gpu)
    for capability, runs in ((75, True), (80, True), (70, False)):
        kinds = query_marlin_supported_quant_types(False, device_capability=capability)
        assert (scalar_types.uint8b128 in kinds) == runs
        zero_points = query_marlin_supported_quant_types(True, device_capability=capability)
        assert (scalar_types.uint4 in zero_points) == runs
