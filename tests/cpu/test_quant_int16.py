"""Our own W8 and W4 arithmetic, against integers computed without it: exact, and a row's result is the row's alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant_layers import Kernel, KernelError, LinearImpl, QuantW4, QuantW8
from quant_layers.kernels import int16
from quant_layers.kernels.int16 import W4Int16, W8Int16

pytestmark = [
    pytest.mark.cpu_tier,
    pytest.mark.skipif(bool(int16.load()), reason=f"the operators {int16.load()}"),
]

MAKES = (W8Int16, W4Int16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed(kernel: Kernel, n: int, k: int, seed: int = 0) -> dict[str, Tensor]:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05 + 0.01
    return kernel.pack(weight)


def rows(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-3, 1, m)[:, None]).to(dtype)


def exactly(make: type[Kernel], quant: QuantW8 | QuantW4, x: Tensor, bias: Tensor | None) -> Tensor:
    """What the kernel promises to compute: the same steps in int64, then fp64."""
    values, k = x.float(), x.shape[1]
    steps = torch.tensor(float(make(x.dtype)._steps(k)))  # type: ignore[attr-defined, call-arg]
    peak = values.abs().amax(1, keepdim=True)
    q = (values * (steps / peak)).round().nan_to_num(0).long()
    size = (peak / steps).double()
    if isinstance(quant, QuantW8):
        out = (q @ quant.q.long().t()).double() * quant.scale.double()
    else:
        groups = quant.scale.shape[1]
        centred = quant.q.view(-1, groups, quant.group_size).long() - quant.zero.long()[..., None]
        sums = torch.einsum("mgk,ngk->mng", q.view(len(x), groups, -1), centred).double()
        out = (sums * quant.scale.double()).sum(-1)
    out *= size
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.name)
@settings(deadline=None, max_examples=25)
@given(
    m=st.integers(1, 40),
    n=st.sampled_from((16, 32, 48, 112)),
    k=st.sampled_from((32, 64, 96, 576)),
    with_bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_every_shape_is_what_the_integers_say(
    make: type[Kernel], dtype: torch.dtype, m: int, n: int, k: int, with_bias: bool, seed: int
) -> None:
    """Guards: a tile of some height or width that drops, doubles or mixes up rows, panels, groups or the bias."""
    kernel = make(dtype)  # type: ignore[call-arg]
    tensors = packed(kernel, n, k, seed)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype) if with_bias else None
    x = rows(m, k, dtype, seed)
    exact = exactly(make, kernel.unpack(tensors), x, bias)  # type: ignore[arg-type]
    error = (kernel.build(tensors, bias)(x).double() - exact).abs()
    # fp32 rounds the integer, three products and each group's sum, none larger than all magnitudes together.
    whole = x.double().abs() @ kernel.reference(tensors).double().abs().t()
    roundings = 4 + kernel.unpack(tensors).scale[0].numel()
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 2**-24 * (roundings * whole + exact.abs())
    assert (error <= allowed + (2**-25 if dtype == torch.float16 else 0)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.name)
@settings(deadline=None, max_examples=25)
@given(m=st.integers(2, 64), n=st.sampled_from((16, 96, 144)), k=st.sampled_from((64, 288)), seed=st.integers(0, 100))
def test_a_row_does_not_know_its_batch(
    make: type[Kernel], dtype: torch.dtype, m: int, n: int, k: int, seed: int
) -> None:
    """Guards: an order of summation, a scale or a tile that depends on the batch: one request would change another's
    answer."""
    kernel = make(dtype)  # type: ignore[call-arg]
    impl = kernel.build(packed(kernel, n, k, seed), None)
    x = rows(m, k, dtype, seed)
    together = impl(x)
    for row in {0, m // 2, m - 1}:
        assert torch.equal(impl(x[row : row + 1])[0], together[row])
    assert torch.equal(impl(x[1:]), together[1:])


@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.name)
def test_the_number_of_threads_changes_nothing(make: type[Kernel]) -> None:
    """Guards: shares of the work that overlap, leave a gap, or sum in another order."""
    kernel = make(torch.float32)  # type: ignore[call-arg]
    impl = kernel.build(packed(kernel, 272, 1024), None)
    x = rows(300, 1024, torch.float32)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outs.append(impl(x))
    finally:
        torch.set_num_threads(before)
    for out in outs[1:]:
        assert torch.equal(out, outs[0])
    assert torch.equal(impl(x[:5]), outs[0][:5])


_SIZES_IN_TURN = """
import os, torch
from quant_layers.kernels.int16 import W8Int16, load

assert not load()
torch.set_num_threads(4)
kernel = W8Int16(torch.float32)
impls = [kernel.build(kernel.pack(torch.randn(n, 1024)), None) for n in (32, 64, 256)]  # 1, 2 and 4 threads for a row
def run():
    for rows in (1, 40):  # the second is rounded by all threads
        for impl in impls:
            impl(torch.randn(rows, 1024))
run()
before = set(os.listdir("/proc/self/task"))
for _ in range(5):
    run()
print(len(before), before == set(os.listdir("/proc/self/task")))
"""


def test_small_calls_between_large_ones_keep_the_threads() -> None:
    """Guards: a team of another size for each call, for which libgomp ends threads and starts them again."""
    done = subprocess.run([sys.executable, "-c", _SIZES_IN_TURN], capture_output=True, text=True, check=True)
    threads, kept = done.stdout.split()
    assert int(threads) >= 4 and kept == "True", done.stdout


@pytest.mark.parametrize("k", [576, 14336, 65536])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_fit(k: int, sign: int) -> None:
    """Guards: one step too many, and the largest possible sum wraps around to the other sign."""
    kernel = W8Int16(torch.float32)
    quant = QuantW8(torch.full((16, k), 127 * sign, dtype=torch.int8), torch.ones(16))
    out = kernel.build(kernel.pack_quant(quant), None)(torch.ones(1, k))
    assert torch.allclose(out, torch.full((1, 16), 127.0 * sign * k), rtol=2**-22, atol=0)


@pytest.mark.parametrize("zero", [0, 15])
def test_the_largest_groups_fit(zero: int) -> None:
    """Guards: a zero point times a group's sum that leaves int32."""
    kernel = W4Int16(torch.float32)
    q = torch.full((16, 256), 15 - zero, dtype=torch.uint8)
    quant = QuantW4(q, torch.ones(16, 2), torch.full((16, 2), zero, dtype=torch.uint8))
    out = kernel.build(kernel.pack_quant(quant), None)(torch.ones(1, 256))
    assert torch.allclose(out, torch.full((1, 16), (15.0 - 2 * zero) * 256), rtol=2**-22, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.name)
def test_odd_activations(make: type[Kernel], dtype: torch.dtype) -> None:
    """Guards: NaN that turns into numbers, or into its neighbours' NaN; zeros and values near underflow that divide."""
    kernel = make(dtype)  # type: ignore[call-arg]
    tensors = packed(kernel, 32, 64)
    impl = kernel.build(tensors, None)
    x = rows(5, 64, dtype)
    healthy = impl(x)
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoiled = x.clone()
        spoiled[1, 3] = bad
        out = impl(spoiled)
        assert out[1].isnan().all()
        assert torch.equal(out[[0, 2, 3, 4]], healthy[[0, 2, 3, 4]])
    assert not impl(torch.zeros(3, 64, dtype=dtype)).any()
    for size in (1e-29, 1e-35, 1e-38):  # too small for the inverse of a step: the exact sum, or nothing
        tiny = torch.full((1, 64), size).to(dtype)
        exact = tiny.double() @ kernel.reference(tensors).double().t()
        assert ((impl(tiny).double() - exact).abs() <= 1.01 * exact.abs()).all()
    large = torch.full((1, 64), torch.finfo(dtype).max / 64, dtype=dtype)
    assert impl(large).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.name)
def test_views_and_empty_batches(make: type[Kernel], dtype: torch.dtype) -> None:
    """Guards: strided rows read as if dense, ranks other than 2, and no rows at all."""
    kernel = make(dtype)  # type: ignore[call-arg]
    impl = kernel.build(packed(kernel, 48, 96), None)
    wide = rows(6, 192, dtype)
    for view in (wide[:, ::2], wide[:, 96:], wide[::2, :96], wide.t()[:96].t()):
        assert torch.equal(impl(view), impl(view.contiguous()))
    flat = impl(wide[:, :96])
    assert torch.equal(impl(wide[:, :96].reshape(2, 3, 96)), flat.view(2, 3, 48))
    assert torch.equal(impl(wide[4, :96]), flat[4])
    assert impl(wide[:0, :96]).shape == (0, 48) and impl(wide.new_empty(2, 0, 96)).shape == (2, 0, 48)


def refused(impl: LinearImpl, x: Tensor, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        impl(x)


def test_what_does_not_fit_is_refused() -> None:
    """Guards: reading past the end of a weight or an activation."""
    kernel = W8Int16(torch.float32)
    tensors = packed(kernel, 32, 64)
    refused(kernel.build(tensors, None), torch.zeros(2, 96), r"the weight is \[32, 64\]")
    refused(kernel.build(tensors, None), torch.zeros(2, 64, dtype=torch.float64), "must be float32")
    refused(kernel.build(tensors, torch.zeros(16)), torch.zeros(2, 64), r"bias must be fp32 \[32\]")
    refused(kernel.build({**tensors, "scale": torch.ones(16)}, None), torch.zeros(2, 64), "scale has 16 channels")
    four = W4Int16(torch.float32)
    parts = packed(four, 32, 128)
    short = {**parts, "zero": parts["zero"][:, :1].contiguous()}
    refused(four.build(short, None), torch.zeros(2, 128), "do not fit")
    with pytest.raises(KernelError, match="w8_int16: N=40 .*multiple of 16"):
        kernel.check_shape(40, 64)
    with pytest.raises(KernelError, match="w4_int16: group size 16"):
        four.check_group(16)
