"""What a linear is at level 0: taken over from vLLM, dropped, and built again, packed or not, in every dtype."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from morphserve.integration.worker.base_linear import UnquantizedBase, dequantize
from quant_layers import KernelError

pytestmark = pytest.mark.cpu_tier

WIDTHS = [8, 4, 4]  # q, k and v, fused
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def loaded(dtype: torch.dtype, with_bias: bool = False) -> Any:
    """A linear of vLLM as its loader leaves it, as far as level 0 reads it."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(96, 64, generator=generator) * 0.1).to(dtype)
    return SimpleNamespace(
        weight=torch.nn.Parameter(weight, requires_grad=False),
        bias=torch.nn.Parameter(torch.randn(96, generator=generator).to(dtype)) if with_bias else None,
        quant_method=None,
        skip_bias_add=False,
        input_size_per_partition=64,
        output_size=96,
        params_dtype=dtype,
        prefix="layers.0.proj",
    )


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("could not create a primitive descriptor for the matmul primitive")


@pytest.fixture(params=[False, True], ids=["as here", "weight kept"])
def no_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether oneDNN has no matmul for any dtype, as on a CPU of a lower tier for bf16 and fp16."""
    if request.param:
        monkeypatch.setattr(ops, "create_onednn_mm", refuse)
    return bool(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_level_0_comes_back_as_it_was(no_onednn: bool, dtype: torch.dtype, with_bias: bool) -> None:
    """Guards: a dtype that cannot be swapped on this CPU; a weight that stays in the module, or comes back another."""
    linear = loaded(dtype, with_bias)
    base = UnquantizedBase(linear)
    stored = {name: tensor.clone() for name, tensor in base.tensors().items()}
    dispatch_cpu_unquantized_gemm(linear, remove_weight=True)
    assert bool(linear.weight.numel()) or not no_onednn
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = linear.cpu_linear(x, linear.weight, linear.bias)
    impl = base.take()
    assert linear.weight.numel() == 0 and impl.nbytes == 96 * 64 * dtype.itemsize
    assert torch.equal(impl(x), expected)
    del impl
    again = base.build(stored)
    assert torch.equal(again(x), expected) and again.nbytes == 96 * 64 * dtype.itemsize


def test_a_kept_weight_goes_with_its_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a weight that something else still holds when its layer is swapped: nothing would be freed."""
    monkeypatch.setattr(ops, "create_onednn_mm", refuse)
    linear = loaded(torch.float32)
    base = UnquantizedBase(linear)
    stored = base.tensors()["weight"].clone()
    dispatch_cpu_unquantized_gemm(linear, remove_weight=True)
    gone = weakref.ref(linear.weight.untyped_storage())
    impl = base.take()
    assert gone() is not None
    del impl
    assert gone() is None
    built = base.build({"weight": stored})
    gone = weakref.ref(stored.untyped_storage())
    del stored, built
    assert gone() is None


def test_a_matmul_that_cannot_be_built_again_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: level 0 restored in torch's linear, which gives other tokens than the oneDNN matmul it was."""
    linear = loaded(torch.float32)
    base = UnquantizedBase(linear)
    stored = base.tensors()
    dispatch_cpu_unquantized_gemm(linear, remove_weight=True)
    assert linear.weight.numel() == 0, "fp32 is packed on every tier"
    base.take()
    monkeypatch.setattr(ops, "create_onednn_mm", refuse)
    with pytest.raises(KernelError, match="layers.0.proj: vLLM could not build its matmul"):
        base.build(stored)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("per_row", [True, False])
def test_scales_find_their_rows(dtype: torch.dtype, per_row: bool) -> None:
    """Guards: the scale of one fused matrix on the rows of another."""
    torch.manual_seed(0)
    values = torch.randint(-16, 17, (sum(WIDTHS), 32)).float()  # float8 has these exactly
    scales = 2.0 ** torch.arange(len(WIDTHS))
    rows = torch.cat([scale.expand(width, 1) for scale, width in zip(scales, WIDTHS, strict=True)])
    if per_row:
        rows = rows * torch.arange(1, len(rows) + 1)[:, None]
    found = dequantize(values.to(dtype), rows if per_row else scales, WIDTHS)
    assert found.dtype == torch.float32
    assert torch.equal(found, values * rows)
