"""Quantizers and layouts: pure arithmetic, checked in float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_layers import (
    CANDIDATES,
    FORMATS,
    Kernel,
    KernelError,
    Quant,
    QuantW4,
    choose_group_size,
    digest,
    quantize_w4,
    quantize_w8,
)
from quant_layers.formats.float8 import F8A8
from quant_layers.formats.packing import (
    pack_w4_int32,
    pack_w4_panels,
    pack_w4_vnni,
    pack_w8_panels,
    pack_w8_vnni,
    unpack_w4_int32,
    unpack_w4_panels,
    unpack_w4_vnni,
    unpack_w8_panels,
    unpack_w8_vnni,
    w4_vnni_shape,
)
from tests.half_steps import half_step
from tests.stand_in_ops import on_any_device, stand_in_operators

_HALF_STEP = 0.5 * (1 + 1e-5)  # fp32 division may land a hair past the middle

weights = st.builds(
    lambda n, k, seed, spread, shift, dtype: _weight(n, k, seed, spread, shift, dtype),
    n=st.integers(1, 5),
    k=st.sampled_from((32, 64, 96, 192)),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from((0.0, 1e-30, 1e-4, 0.05, 1.0, 1e4)),
    shift=st.sampled_from((-3.0, -0.5, 0.0, 0.5, 3.0)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
)


def _weight(n: int, k: int, seed: int, spread: float, shift: float, dtype: torch.dtype) -> torch.Tensor:
    """`shift` in units of `spread`; the first row is constant, as a pruned channel would be."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=generator) + shift) * spread
    weight[0] = shift * spread
    return weight.clamp(-60_000, 60_000).to(dtype)


def _random_w4(n: int, k: int, size: int, seed: int = 0) -> QuantW4:
    generator = torch.Generator().manual_seed(seed)
    return QuantW4(
        torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8),
        torch.rand(n, k // size, generator=generator),
        torch.randint(0, 16, (n, k // size), generator=generator, dtype=torch.uint8),
    )


@pytest.mark.parametrize("canonical", FORMATS.values(), ids=FORMATS)
@settings(deadline=None, max_examples=200)
@given(weight=weights, scale_dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
def test_every_format_is_within_half_a_step(
    canonical: type[Quant], weight: torch.Tensor, scale_dtype: torch.dtype
) -> None:
    """Guards against a scale that clips the largest weight or is zero, and a format that errs by more than it says."""
    quant = canonical.of(weight, scale_dtype)
    assert (quant.scale > 0).all()  # a zero step would make q the cast of a nan
    error = (quant.dequantize().double() - weight.double()).abs()
    assert (error <= 2 * _HALF_STEP * half_step(quant).double()).all()


@pytest.mark.parametrize("canonical", FORMATS.values(), ids=FORMATS)
def test_no_format_claims_a_coarser_grid_than_it_has(canonical: type[Quant]) -> None:
    """Guards against half steps so wide that a test against them proves nothing."""
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(0))  # every group has the whole range
    weight = torch.linspace(-1, 1, 4096)[order].repeat(2, 1)
    quant = canonical.of(weight)
    error = (quant.dequantize() - weight).abs() / half_step(quant)
    assert 0.9 < float(error.max()) <= 1 + 1e-3
    assert 0.9 < float(half_step(quant).max()) * quant.coarsest_levels < 1.1


def test_fp8_is_what_torch_rounds_to() -> None:
    """Guards against a largest weight that becomes NaN, and against steps of another float8."""
    weight = torch.tensor([[448.0, -448.0, 1.0, 1.06, 0.0, 2**-6, 2**-9, 2**-11]])
    half_steps = [[16.0, 16.0, 2**-4, 2**-4, 2**-10, 2**-10, 2**-10, 2**-10]]
    quant = FORMATS["fp8"].of(weight)
    assert quant.scale.item() == 1 and quant.q.dtype == torch.float8_e4m3fn
    assert quant.dequantize().tolist() == [[448.0, -448.0, 1.0, 1.0, 0.0, 2**-6, 2**-9, 0.0]]
    assert half_step(quant).tolist() == half_steps
    assert F8A8(torch.bfloat16).activation_half_step(weight).tolist() == half_steps
    assert FORMATS["fp8"].of(torch.tensor([[9e-43]])).dequantize().isfinite().all()  # its scale rounds down to a third


@pytest.mark.parametrize("make", CANDIDATES, ids=lambda make: make.name)
def test_every_kernel_unpacks_what_it_packed(make: type[Kernel]) -> None:
    """Guards against a layout that loses or permutes weights, and a weight of another format taken for ours."""
    with contextlib.ExitStack() as stack:
        if make.packs_on:
            stack.enter_context(stand_in_operators())
            make = on_any_device(make)
        _unpacks_what_it_packed(make(torch.bfloat16))


def _unpacks_what_it_packed(kernel: Kernel) -> None:
    weight = _weight(*kernel.proof_shapes[0], 3, 0.05, 0.5, torch.bfloat16)
    for canonical in FORMATS.values():
        quant = canonical.of(weight, torch.bfloat16)
        if canonical is not kernel.canonical:
            other = canonical.format
            with pytest.raises(KernelError, match=f"this weight is {other}; name it under {other}"):
                kernel.pack_quant(quant)
            continue
        back = kernel.unpack(kernel.pack_quant(quant))
        assert torch.equal(back.q.float(), quant.q.float())
        assert torch.equal(back.dequantize(), quant.dequantize())
        assert torch.equal(kernel.reference(kernel.pack_quant(quant)), quant.dequantize())


@settings(deadline=None, max_examples=300)
@given(
    weight=weights,
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
)
def test_w4_is_within_half_a_step(weight: torch.Tensor, symmetric: bool, scale_dtype: torch.dtype) -> None:
    """Guards against a zero point or a rounded-down scale that pushes a group's end off the grid."""
    size = choose_group_size(weight.shape[1])
    quant = quantize_w4(weight, size, symmetric=symmetric, scale_dtype=scale_dtype)
    error = (quant.dequantize().double() - weight.double()).abs().view(weight.shape[0], -1, size)
    assert quant.scale.dtype == scale_dtype and (quant.scale > 0).all()
    assert int(quant.q.max()) <= 15 and int(quant.zero.max()) <= 15
    assert (error <= _HALF_STEP * quant.scale.double()[..., None]).all()


def test_asymmetric_w4_halves_the_step_of_one_sided_weights() -> None:
    """Guards against zero points that are computed but not used: a one-sided group must profit from them."""
    weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    steps = [quantize_w4(weight, 64, symmetric=symmetric).scale for symmetric in (False, True)]
    assert (steps[0] < 0.55 * steps[1]).all()


@given(blocks=st.integers(1, 3), k=st.sampled_from((4, 32, 96)), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_w8_layout_is_a_bijection(blocks: int, k: int, seed: int) -> None:
    """Guards against a permutation that reads back another weight than was packed."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (32 * blocks, k), generator=generator, dtype=torch.int8)
    packed = pack_w8_vnni(q)
    assert packed.shape == (32 * blocks, k + 4)
    assert torch.equal(unpack_w8_vnni(packed), q)
    assert torch.equal(unpack_w8_panels(pack_w8_panels(q)), q)
    tail = packed.view(blocks, -1)[:, 32 * k :].contiguous().view(torch.int32).flatten()
    assert torch.equal(tail, 128 * q.int().sum(dim=1, dtype=torch.int32))


@given(
    blocks=st.integers(1, 3),
    groups=st.integers(1, 4),
    size=st.sampled_from((32, 64)),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_w4_layouts_are_bijections(blocks: int, groups: int, size: int, seed: int) -> None:
    """Guards against nibbles, zero points or scales that change place between packing and reading."""
    quant = _random_w4(32 * blocks, groups * size, size, seed)
    vnni = pack_w4_vnni(quant)
    assert w4_vnni_shape(vnni["weight"]) == tuple(quant.q.shape)
    panels = unpack_w4_panels(pack_w4_panels(quant))
    for back in (unpack_w4_vnni(vnni), unpack_w4_int32(pack_w4_int32(quant)), panels):
        assert torch.equal(back.q, quant.q)
        assert torch.equal(back.zero, quant.zero)
        assert torch.equal(back.scale, quant.scale)
        assert back.group_size == size


def test_w4_block_ends_in_the_sums_of_its_centred_weights() -> None:
    """Guards against a wrong compensation, which would shift every output by a constant per channel."""
    quant = _random_w4(64, 128, 32)
    tail = pack_w4_vnni(quant)["weight"][..., -128:].contiguous().view(torch.int32)  # [2, 4, 32]
    sums = (quant.q.view(64, 4, 32).long() - quant.zero.long()[..., None]).sum(-1)
    assert torch.equal(tail.permute(0, 2, 1).reshape(64, 4).long(), sums)


@pytest.mark.parametrize(("k", "expected"), [(576, 64), (1536, 64), (96, 32), (32, 32)])
def test_group_size_is_the_largest_that_divides(k: int, expected: int) -> None:
    """Guards against small groups where larger ones fit: they cost memory."""
    assert choose_group_size(k) == expected


def test_unfit_weights_are_refused_with_value_and_remedy() -> None:
    """Guards against silent garbage from odd sizes, wrong ranks and damaged checkpoints."""
    with pytest.raises(KernelError, match=r"K=72 .*\(64, 32\).*w8"):
        choose_group_size(72)
    with pytest.raises(KernelError, match="group size 64 does not divide K=96; use 32"):
        quantize_w4(torch.zeros(2, 96), 64)
    with pytest.raises(KernelError, match=r"\(2, 3, 4\)"):
        quantize_w8(torch.zeros(2, 3, 4))
    damaged = torch.zeros(2, 64)
    damaged[1, 3] = float("nan")
    for quantize in (quantize_w8, lambda w: quantize_w4(w, 64)):
        with pytest.raises(KernelError, match="1 of 128 weights are not finite"):
            quantize(damaged)


# The name of a kernel stands for the layout of what it packed, on disk: a cache outlives an upgrade.
_LAYOUTS = {
    "w8a8_vnni": "3d9dd69656515c60",
    "w8a8_onednn": "e5bde145c48616ae",
    "w4a8_vnni": "207023fb4185d6cc",
    "w4a16": "5e9738cfeb70cb34",
    "w8_int16": "f9cd7a399d606781",
    "w4_int16": "57451b97fe2f7a22",
    "w8_plain": "e5bde145c48616ae",
    "w4_plain": "d91e7947027e7808",
    "w8a16_aten": "3e5cb267d7e35e8f",
    "w4a16_triton": "4287451f2b28c6c0",
    "fp8_torch": "fd45206e2f4edaf0",
    "fp8a16": "fd45206e2f4edaf0",
    "fp8_cutlass": "fd45206e2f4edaf0",
    "w4a16_marlin": "94968bbc4f986ff4",
    "w8a16_marlin": "e57e6b1e519fd388",
}


def test_a_changed_layout_has_a_new_name() -> None:
    """Guards against an upgrade that reads what an older version packed, and computes something else with it.

    If this fails because `pack` gives other bytes than before, rename the kernel, then write down its digest.
    """
    numbers = torch.arange(64 * 128, dtype=torch.int64)
    weight = ((numbers * 37 % 251 - 125).float() / 256).view(64, 128).bfloat16()  # exact: the same on every CPU
    kernels = (make() for make in CANDIDATES if not make.packs_on)  # the others' layouts are vLLM's, and never stored
    found = {kernel.name: digest({"linear": kernel.pack(weight)})[:16] for kernel in kernels}
    assert found == _LAYOUTS
