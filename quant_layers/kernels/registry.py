"""All kernels and formats there are. Nothing outside this package lists them by hand.

A new format is two classes, and `register`:

* the canonical form, a subclass of `Quant` (formats/canonical.py): what a quantized weight means, and how a weight is
  rounded to it;
* at least one kernel, best a subclass of `KernelBase` (base.py): its name and its `canonical` form, `lay_out` into
  tensors that can be stored, `unpack` back, and the `linear` that runs them (cpu_linears.py). Several kernels may share
  a format: the first that passes its self-test runs it.

Users then name the format under `ladder.steps`, `kernels` and `variants`; the default ladder stays what it is. A
layer's bytes are those of the tensors that `pack_quant` gives. What is parametrized over `CANDIDATES` tests it without
a line more, if its steps are even (tests/half_steps.py is told of others): layouts (tests/cpu/test_quant_packing.py,
which also wants the digest of a layout written down; not of one that an operator makes, which belongs to the vLLM that
brings it and must not outlive the process), the self-test and odd batches on the installed vLLM
(tests/seams/test_quant_kernels.py), a layer of a live engine (tests/engine/test_formats_live.py).
tests/cpu/test_quant_registry.py takes a toy format of 3 bits the whole way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, ValuesView
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from quant_layers.errors import KernelError
from quant_layers.formats.canonical import Quant
from quant_layers.formats.halves import split_format
from quant_layers.kernels.cpu_linears import LinearImpl


class Kernel(Protocol):
    """One way to run one format. Instances are bound to the activation dtype."""

    name: str  # also of the packed layout on disk: whoever changes what `pack` gives changes the name
    format: str  # that of `canonical`
    canonical: type[Quant]
    dtype: torch.dtype  # of activations, outputs, and weights to pack (or these in fp32)
    quantizes_activations: bool  # per token, to 8 bits: then folding outliers into the weights (smoothing.py) pays
    runs_on: tuple[str, ...]  # device types, of which it needs one; empty: any
    slow_on: tuple[str, ...]  # device types on which every other kernel of the format goes first
    fast_on: tuple[str, ...]  # device types on which it goes first
    packs_on: str  # device type whose operator lays weights out; empty: torch alone does, on any device
    proof_shapes: tuple[tuple[int, int], ...]  # [N, K] that the self-test runs, each of which the kernel must take

    def unavailable(self) -> str:
        """Say why this kernel cannot run here with this dtype, or return an empty string."""
        ...

    def check_shape(self, n: int, k: int) -> None:
        """Raise KernelError when a weight [n, k] does not fit this kernel."""
        ...

    def check_group(self, size: int) -> None:
        """Raise KernelError when scales for groups of so many input channels do not fit this kernel."""
        ...

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantize and lay out a weight [N, K], on the device where it lies: plain tensors that can be stored."""
        ...

    def pack_quant(self, quant: Quant) -> dict[str, Tensor]:
        """Lay out a weight that somebody else quantized.

        Raises:
            KernelError: another format than this kernel's, or a shape that does not fit it.
        """
        ...

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        """Invert `pack_quant`, but for the dtype of scales."""
        ...

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        """Make a stored linear callable. Keeps references to `tensors` where the kernel reads them."""
        ...

    def reference(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return what the stored linear means: fp32 [N, K]."""
        ...

    def activation_half_step(self, x: Tensor) -> Tensor:
        """Return the most by which it moves each activation of `x` [M, K] when it rounds them: fp64 [M, K]."""
        ...


_kernels: dict[str, type[Kernel]] = {}
_formats: dict[str, type[Quant]] = {}

# Live: who holds them sees what is registered later. Within a format, the first kernel that passes its self-test runs.
CANDIDATES: ValuesView[type[Kernel]] = _kernels.values()
FORMATS: Mapping[str, type[Quant]] = MappingProxyType(_formats)  # as users write them |-> canonical form


def register(kernel: type[Kernel]) -> None:
    """Add a kernel behind those of its format, and its format where it is the first.

    Raises:
        KernelError: its name is taken, or that of its format is, by another canonical form; or the format's name does
            not end in its bits, by which policies, which know no kernels, tell formats apart.
    """
    canonical = kernel.canonical
    if not canonical.format or split_format(canonical.format)[0] != canonical.format:
        raise KernelError(f"format {canonical.format!r} of {canonical.__name__} must be a name without '/'; rename it")
    if not re.search(rf"(?<![0-9]){canonical.bits}$", canonical.format):
        raise KernelError(f"format {canonical.format!r} must end in its bits, {canonical.bits}, as w8 does; rename it")
    if kernel.name in _kernels or _formats.get(canonical.format, canonical) is not canonical:
        raise KernelError(
            f"kernel {kernel.name!r} or format {canonical.format!r} is registered already; give it another name"
        )
    _kernels[kernel.name] = kernel
    _formats[canonical.format] = canonical
