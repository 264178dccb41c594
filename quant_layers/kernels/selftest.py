"""Proves each kernel on this machine against float64 before anything relies on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_layers.errors import KernelError
from quant_layers.formats.canonical import group_of_slice
from quant_layers.kernels.cpu_linears import LinearImpl
from quant_layers.kernels.registry import CANDIDATES, FORMATS, Kernel

logger = logging.getLogger("vllm.morphserve")

_warned: set[str] = set()  # formats that were said to be slow here

_ROWS = (1, 17)
_SIGMAS = 6.0  # of the error that rounding alone causes; the inputs are seeded, so this is no coin toss


@dataclass(frozen=True, slots=True)
class KernelReport:
    """The findings of one kernel's self-test."""

    name: str
    format: str
    ok: bool
    reason: str  # empty when ok
    worst_error: float  # largest error seen as a share of what rounding explains; nan if it never ran


def probe(dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> dict[str, KernelReport]:
    """Check every kernel for activations of `dtype`. Never raises; takes a few tenths of a second."""
    return {make.name: check_kernel(make(dtype), device) for make in CANDIDATES}


def choose(
    format: str,
    dtype: torch.dtype = torch.bfloat16,
    name: str | None = None,
    device: str = "cpu",
    shapes: Sequence[tuple[int, int]] = (),
    group_sizes: Sequence[int] = (),
) -> Kernel:
    """Choose the first kernel for `format` that takes these shapes [N, K] and passes its self-test, or the named one.

    Kernels that are slow on this type of device are tried last. `group_sizes` are those of a checkpoint, for weights
    that are not rounded here; see `group_of_slice`.

    Raises:
        KernelError: unknown format or name, or no kernel passes; names each candidate and why it failed.
    """
    if format not in FORMATS:
        raise KernelError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    candidates = by_preference(format, device)
    if name is not None:
        known = ", ".join(make.name for make in candidates)
        candidates = [make for make in candidates if make.name == name]
        if not candidates:
            raise KernelError(f"unknown kernel {name!r} for {format}; known are {known}")
    failed = []
    for kernel in (make(dtype) for make in candidates):
        try:
            for n, k in shapes:
                kernel.check_shape(n, k)
                for group in filter(None, (group_of_slice(size, k) for size in group_sizes)):
                    kernel.check_group(group)
        except KernelError as error:
            failed.append(str(error))
            continue
        report = check_kernel(kernel, device)
        if report.ok:
            if name is None and device in kernel.slow_on and format not in _warned:
                _warned.add(format)
                logger.warning(
                    "morphserve: %s is slow here: it runs as %s, for no faster kernel can (%s)",
                    format, kernel.name, "; ".join(failed),
                )  # fmt: skip
            return kernel
        failed.append(f"{report.name}: {report.reason}")
    raise KernelError(
        f"no kernel can run {format} with {dtype} activations here ({'; '.join(failed)}); "
        f"remove {format} from the configured formats, or use another dtype or machine"
    )


def by_preference(format: str, device: str = "cpu") -> list[type[Kernel]]:
    """Return the kernels of a format, in the order in which they are tried."""
    makes = (make for make in CANDIDATES if make.format == format)
    return sorted(
        makes, key=lambda make: (bool(_needs(make, device)), device in make.slow_on, device not in make.fast_on)
    )


def _needs(kernel: Kernel | type[Kernel], device: str) -> str:
    """Say why a kernel is not for this type of device, or return an empty string."""
    if not kernel.runs_on or device in kernel.runs_on:
        return ""
    return f"needs a {' or '.join(kernel.runs_on)} device, not {device}"


def check_kernel(kernel: Kernel, device: str = "cpu") -> KernelReport:
    """Run one kernel on small random linears and compare with its own dequantization in float64."""
    worst = float("nan")
    try:
        reason = _needs(kernel, device) or kernel.unavailable()  # in this order: the second may compile it
        if not reason:
            worst = max(_worst_error(kernel, n, k, device) for n, k in kernel.proof_shapes)
            if not worst <= 1.0:  # also catches nan
                reason = f"self-test error is {worst:.3g} times what rounding explains, limit 1"
    except Exception as error:  # a kernel that fails in any way is one that is not used
        reason = f"self-test raised {type(error).__name__}: {error}"
    return KernelReport(kernel.name, kernel.format, not reason, reason, worst)


def _worst_error(kernel: Kernel, n: int, k: int, device: str) -> float:
    """Return the largest error over batch sizes, with and without bias, as a share of the bound."""
    dtype = kernel.dtype
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator)
    # Off-centre, so that zero points lie off the middle of the grid and a kernel that drops them is caught.
    weight = ((weight + 0.5) * 0.05).to(device, dtype)
    tensors = kernel.pack(weight)
    meaning = kernel.reference(tensors).double()
    worst = float(_packing_error(kernel, weight, meaning))
    for bias in (None, torch.randn(n, generator=generator).to(device, dtype)):
        impl = kernel.build(tensors, bias)
        for rows in _ROWS:
            x = torch.randn(rows, k, generator=generator)
            x[:, 0] *= 20.0  # an outlier channel, as real activations have
            x[rows // 2 + 1 :] *= 0.01
            x[rows - 1] *= rows == 1  # padding rows are zero
            worst = max(worst, _run_error(kernel, impl, x.to(device, dtype), meaning, bias))
        _check_views(impl, torch.randn(6, 2 * k, generator=generator).to(device, dtype), k)
    return worst


def _packing_error(kernel: Kernel, weight: Tensor, meaning: Tensor) -> Tensor:
    """Return how far the packed is from the original weight, as a share of one step of the widest possible grid."""
    values = weight.double()
    step = 2 * values.abs().amax(dim=1, keepdim=True) / kernel.canonical.coarsest_levels
    return ((meaning - values).abs() / step).max()


def _run_error(kernel: Kernel, impl: LinearImpl, x: Tensor, meaning: Tensor, bias: Tensor | None) -> float:
    """Return the largest output error as a share of what activation steps and the output dtype explain."""
    exact = x.double() @ meaning.t()
    if bias is not None:
        exact += bias.double()
    spread = x.double().square() @ meaning.square().t()
    eps = torch.finfo(x.dtype).eps
    bound = eps * (exact.abs() + _SIGMAS * spread.sqrt()) + _summation_error(exact, spread, x.shape[1])
    variance = kernel.activation_half_step(x).square() / 3  # of what is spread evenly between the half steps
    bound = bound + _SIGMAS * (variance @ meaning.square().t()).sqrt()
    got = impl(x)
    if got.dtype != x.dtype or got.shape != exact.shape:
        raise KernelError(f"returned {got.dtype} {tuple(got.shape)}, expected {x.dtype} {tuple(exact.shape)}")
    error = (got.double() - exact).abs()
    if not torch.isfinite(error).all():
        raise KernelError("returned values that are not finite")
    return float((error / (bound + torch.finfo(torch.float32).tiny)).max())


def _summation_error(exact: Tensor, spread: Tensor, k: int) -> Tensor:
    """Return what adding K products in fp32 explains, in whatever order: counts only where outputs are fp32, too.

    Each of K additions rounds its partial sum by half an ulp at most: evenly spread, so eps / 2 / sqrt(3) of it. No
    partial sum is much larger than the whole, nor than products that cancel (their root mean square, `spread`), and
    the roundings are independent: K of them weigh sqrt(K) times one.
    """
    largest = (exact.square() + spread).sqrt()
    return _SIGMAS * torch.finfo(torch.float32).eps / 2 * (k / 3) ** 0.5 * largest


def _check_views(impl: LinearImpl, wide: Tensor, k: int) -> None:
    """Check that other ranks, strided rows and no rows at all give what contiguous rows give."""
    rows = wide[:, :k]
    expected = impl(rows.contiguous())
    for name, got in (
        ("strided rows", impl(rows)),
        ("three dimensions", impl(rows.reshape(2, 3, k)).reshape(expected.shape)),
        ("one row as a vector", torch.stack([impl(row) for row in rows.contiguous()])),
    ):
        # Another batch size may take another summation order, so the last bits of the output may differ.
        slack = 0.01 * float(expected.abs().max())
        if not torch.allclose(got.float(), expected.float(), rtol=0.02, atol=slack):
            raise KernelError(f"{name} give another result than contiguous rows")
    if impl(rows[:0]).shape != (0, expected.shape[1]):
        raise KernelError("an empty batch does not give an empty result")
