"""Our tensors and calls for Machete against those of vLLM's own linear; the operators are stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.kernels.linear.mixed_precision.machete import MacheteLinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils.machete_utils import (
    MACHETE_PREPACKED_BLOCK_SHAPE,
    check_machete_supports_shape,
    query_machete_supported_group_sizes,
    query_machete_supported_quant_types,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import pack_cols, pack_rows
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.scalar_type import scalar_types

from quant_layers import KernelError, QuantW4, W4A16Machete, quantize_w4
from quant_layers.kernels.cpu_linears import UINT4_ID
from tests.stand_in_ops import on_any_device, stand_in_operators

pytestmark = pytest.mark.seams

N, K, ROWS = 256, 384, 5
DTYPES = (torch.bfloat16, torch.float16)


class Recorder:
    """An operator, and what it was called with."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.calls: list[tuple[object, ...]] = []
        self.default = self

    def __call__(self, *args: object) -> Tensor:
        self.calls.append(args)
        out: Tensor = self._run(*args)
        return out


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Recorder]]:
    with stand_in_operators():
        found = {name: Recorder(getattr(torch.ops._C, name)) for name in ("machete_prepack_B", "machete_mm")}
        for name, recorder in found.items():
            monkeypatch.setattr(torch.ops._C, name, recorder, raising=False)
        yield found


def same(ours: tuple[object, ...], theirs: tuple[object, ...]) -> None:
    """The same arguments at the same places, tensors by value, dtype, shape and strides."""
    assert len(ours) == len(theirs)
    for place, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(mine, Tensor):
            assert isinstance(other, Tensor) and mine.dtype == other.dtype and mine.stride() == other.stride(), place
            assert torch.equal(mine, other), place
        else:
            assert mine == other, place


def vllms_linear(monkeypatch: pytest.MonkeyPatch, quant: QuantW4, dtype: torch.dtype) -> tuple[Any, torch.nn.Module]:
    """Its linear of the same weights, from parameters as its loaders leave them."""
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1)
    layer, groups = torch.nn.Module(), K // quant.group_size
    rows = {"input_dim": 0, "output_dim": 1, "weight_loader": lambda *_: None}
    columns = {"input_dim": 1, "output_dim": 0, "weight_loader": lambda *_: None}
    q, zero = quant.q.t().int().contiguous(), quant.zero.int()
    layer.q = PackedvLLMParameter(data=pack_rows(q, 4, K, N), packed_dim=0, packed_factor=8, **rows)
    layer.s = GroupQuantScaleParameter(data=quant.scale.clone(), **columns)  # [N, G], to be turned
    points = pack_cols(zero.t().contiguous(), 4, groups, N)
    layer.z = PackedvLLMParameter(data=points, packed_dim=1, packed_factor=8, **rows)
    config = MPLinearLayerConfig((K, N), (K, N), scalar_types.uint4, dtype, quant.group_size, zero_points=True)
    kernel = MacheteLinearKernel(config, "q", "s", "z")
    kernel.process_weights_after_loading(layer)
    return kernel, layer


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_packed_and_called_as_vllm_does(
    monkeypatch: pytest.MonkeyPatch, recorders: dict[str, Recorder], dtype: torch.dtype, group_size: int
) -> None:
    """Guards: words, scales or zero points that the real operator reads as something else, and arguments elsewhere than
    vLLM puts them: no CPU can tell what Machete computes."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) + 0.3
    quant = quantize_w4(weight, group_size, scale_dtype=dtype)
    assert len(quant.zero.unique()) > 2
    theirs, layer = vllms_linear(monkeypatch, quant, dtype)
    ours = on_any_device(W4A16Machete)(dtype)  # type: ignore[call-arg]
    packed = ours.pack_quant(quant)
    for name, tensor in (("q", "weight"), ("s", "scale"), ("z", "zero")):
        same((packed[tensor],), (getattr(layer, name).data,))
    prepacked = recorders["machete_prepack_B"].calls
    same(prepacked[1], prepacked[0])
    x = torch.randn(ROWS, K, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = theirs.apply_weights(layer, x, bias)
    assert torch.equal(ours.build(packed, bias)(x), expected)
    multiplied = recorders["machete_mm"].calls
    same(multiplied[1], multiplied[0])
    for name, recorder in recorders.items():
        arguments = getattr(torch.ops.morphserve_stand_in, name).default._schema.arguments
        assert {len(call) for call in recorder.calls} == {len(arguments)}


def test_what_it_takes_is_what_vllm_says_it_takes() -> None:
    """Guards: a shape or a group size that the operator ends the process on, and one that need not be refused."""
    assert scalar_types.uint4.id == UINT4_ID
    assert scalar_types.uint4 in query_machete_supported_quant_types(True)
    kernel = W4A16Machete()
    block_k, block_n = MACHETE_PREPACKED_BLOCK_SHAPE
    for n in (block_n // 2, block_n, 3 * block_n, 100):
        for k in (block_k // 2, block_k, 3 * block_k, 100):
            supported, _ = check_machete_supports_shape(k, n)
            if supported:
                kernel.check_shape(n, k)
            else:
                with pytest.raises(KernelError, match="is not a positive multiple of"):
                    kernel.check_shape(n, k)
    for dtype in DTYPES:
        for size in (32, 64, 128):
            if size in query_machete_supported_group_sizes(dtype):
                W4A16Machete(dtype).check_group(size)
            else:
                with pytest.raises(KernelError, match=f"group size {size}"):
                    W4A16Machete(dtype).check_group(size)
