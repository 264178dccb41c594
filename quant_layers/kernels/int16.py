"""W8 and W4 on every x86-64 CPU with AVX2: exact integer sums over activations in 16-bit steps.

Each token is rounded to integers so fine that next to nothing is lost, and just coarse enough that no sum of products
leaves int32. So a token's result depends neither on the batch it is in, nor on threads, nor on the CPU's tier. The
arithmetic is C++ of our own (csrc/int16_linear.cpp), compiled at first use for the tier this process may use; what is
packed is the same for every tier.
"""

from __future__ import annotations

import functools
import logging
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_layers.formats import packing
from quant_layers.formats.canonical import IMPORTED_GROUP_SIZES, Quant, QuantW4, QuantW8
from quant_layers.kernels import native
from quant_layers.kernels.base import KernelBase
from quant_layers.kernels.cpu_linears import LinearImpl, Native, nbytes_of

logger = logging.getLogger("vllm.morphserve")

_CSRC = Path(__file__).with_name("csrc")
_MAX_STEPS = 2**15 - 1
_MAX_SUM = 2**31 - 1
_MAX_WEIGHT = 127

# What each tier has over the one before it: capabilities as torch.cpu names them, and the compiler's flags.
_TIERS = (
    ("avx2", ("avx2", "fma3", "f16c"), ("-mavx2", "-mfma", "-mf16c")),
    (
        "avx512",
        ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"),
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    ),
    ("vnni", ("avx512_vnni",), ("-mavx512vnni",)),
)


def tier() -> str:
    """Return the highest tier whose instructions this process may use, or an empty string.

    torch is asked, not the CPU: where a lower tier is emulated, torch answers for that.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    has = torch.cpu.get_capabilities()
    found = ""
    for name, needs, _ in _TIERS:
        if not all(has.get(capability, False) for capability in needs):
            break
        found = name
    return found


def units(tier: str) -> tuple[native.Unit, ...]:
    """List what is compiled for a tier. Only the file that does the arithmetic has the tier's instructions."""
    names = [name for name, _, _ in _TIERS]
    flags = [flag for _, _, own in _TIERS[: names.index(tier) + 1] for flag in own]
    return (
        native.Unit(_CSRC / "int16_linear.cpp", ("-fopenmp", *flags), torch=False),
        native.Unit(_CSRC / "int16_ops.cpp"),
    )


@functools.cache
def load() -> str:
    """Load the operators, compiled first where they are not. Return why not, or an empty string."""
    found = tier()
    if not found:
        return "needs an x86-64 CPU with AVX2, FMA and F16C"
    try:
        native.load(f"int16-{found}", units(found))
    except Exception as e:  # no compiler, no space, a broken toolchain: slower kernels serve
        logger.warning(
            "morphserve: the W8 and W4 kernels for this CPU could not be compiled (%s); others serve, and slowly. "
            "Install g++, or set CXX to it, and start again",
            e,
        )
        return f"cannot be compiled here: {e}"
    return ""


class _Int16(KernelBase):
    quantizes_activations = False  # not so that folding outliers into the weights would pay
    runs_on = ("cpu",)
    _dtypes = (torch.float32, torch.bfloat16, torch.float16)
    _multiples = (16, 16)
    proof_shapes = ((960, 576), (576, 1536), (48, 32))  # the last: panels that do not come in pairs

    def _no_device(self) -> str:
        return load()

    @property
    def _scale_dtype(self) -> torch.dtype:
        return torch.float32

    def _steps(self, k: int) -> int:
        """Return the number of steps from 0 to the largest activation of a row."""
        raise NotImplementedError

    def activation_half_step(self, x: Tensor) -> Tensor:
        return (x.double().abs().amax(dim=1, keepdim=True) / self._steps(x.shape[1]) / 2).expand(x.shape)


class W8Int16(_Int16):
    """A kernel of 8-bit weights, with as many steps of activations as K products leave room for in int32."""

    name, canonical = "w8_int16", QuantW8

    def _steps(self, k: int) -> int:
        return min(_MAX_STEPS, _MAX_SUM // (_MAX_WEIGHT * k))

    def lay_out(self, quant: QuantW8) -> dict[str, Tensor]:
        return {"weight": packing.pack_w8_panels(quant.q), "scale": quant.scale.float()}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return QuantW8(packing.unpack_w8_panels(tensors["weight"]), tensors["scale"])

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return Int16Linear("w8_linear", (tensors["weight"], tensors["scale"]), bias)


class W4Int16(_Int16):
    """A kernel of 4-bit weights with zero points: int32 sums in a group, fp32 across groups, always in one order."""

    name, canonical = "w4_int16", QuantW4
    _groups = IMPORTED_GROUP_SIZES

    def _steps(self, k: int) -> int:
        return _MAX_STEPS

    def lay_out(self, quant: QuantW4) -> dict[str, Tensor]:
        return packing.pack_w4_panels(quant)

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        return packing.unpack_w4_panels(tensors)

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return Int16Linear("w4_linear", (tensors["weight"], tensors["zero"], tensors["scale"]), bias)


class Int16Linear:
    """A linear on `morphserve_int16::w8_linear` or `w4_linear`, which take rows of any rank, stride and number."""

    __slots__ = ("_arguments", "_name", "_run", "nbytes")

    def __init__(self, name: str, tensors: tuple[Tensor, ...], bias: Tensor | None) -> None:
        self._name = name
        self._run: Callable[..., Any] = getattr(torch.ops.morphserve_int16, name).default
        self._arguments = (*tensors, None if bias is None else bias.float().contiguous())
        self.nbytes = nbytes_of(*self._arguments)

    @property
    def native(self) -> Native:
        """Arguments for a caller that runs the operator itself."""
        *tensors, bias = self._arguments
        return f"int16_{self._name}", tuple(tensors), bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._run(x, *self._arguments)
        return out
