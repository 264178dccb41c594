"""Our packing for Marlin against what vLLM itself packs, bit by bit: the kernel runs on GPUs only."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales, marlin_zero_points
from vllm.model_executor.layers.quantization.utils.marlin_utils_test import get_weight_perm, marlin_weights
from vllm.scalar_type import scalar_types

from quant_layers import KernelError, QuantW4, W4A16Marlin, quantize_w4
from quant_layers.marlin import UINT4_ID, pack_w4_marlin, unpack_w4_marlin

pytestmark = pytest.mark.seams


def quant(n: int, k: int, group_size: int) -> QuantW4:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    return quantize_w4(weight, group_size, scale_dtype=torch.bfloat16)


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


@pytest.mark.parametrize(("n", "k", "group_size"), [(64, 256, 64), (192, 384, 128), (64, 128, 128)])
def test_unpacking_is_the_inverse(n: int, k: int, group_size: int) -> None:
    """Guards: a reference that means another weight than the kernel computes with."""
    found = quant(n, k, group_size)
    again = unpack_w4_marlin(pack_w4_marlin(found))
    assert torch.equal(again.q, found.q) and torch.equal(again.zero, found.zero)
    assert torch.equal(again.scale, found.scale)


def test_the_type_is_the_one_vllm_names() -> None:
    """Guards: the kernel told that weights are of a type they are not."""
    assert scalar_types.uint4.id == UINT4_ID


def test_what_does_not_fit_is_refused() -> None:
    """Guards: a kernel that reads beyond a weight."""
    kernel = W4A16Marlin()
    for n, k, words in ((96, 256, "N=96"), (64, 192, "K=192 of a weight")):
        with pytest.raises(KernelError, match=words):
            kernel.check_shape(n, k)
    with pytest.raises(KernelError, match="group size 256"):
        kernel.pack_quant(quant(64, 512, 256))
    if not torch.cuda.is_available():
        assert kernel.unavailable() == "needs an NVIDIA GPU"
