"""What kernels share: the gates for dtypes, shapes, operators and CPUs, declared as class attributes."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quant_layers.errors import KernelError
from quant_layers.formats.canonical import Quant, QuantW4, choose_group_size, round_in_pieces

_INT8_STEPS = 127


def _missing(names: tuple[str, ...]) -> str:
    absent = [name for name in names if not hasattr(torch.ops._C, name)]
    return f"operators not loaded: {', '.join(absent)}" if absent else ""


_CPU_FEATURES = (("_is_vnni_supported", "AVX512-VNNI"), ("_is_avx512_bf16_supported", "AVX512-BF16"))


def _no_vnni() -> str:
    """The VNNI kernels end the process, uncatchably, on a CPU they were not compiled for: ask first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"needs an x86 CPU with AVX512-VNNI and AVX512-BF16, this is {platform.machine()}"
    for query, feature in _CPU_FEATURES:
        supported = getattr(torch.cpu, query, None)
        if supported is None or not supported():
            return f"this CPU has no {feature}"
    return ""


class KernelBase:
    """A `Kernel` (registry.py) but for its layout: a subclass brings `pack_quant`, `unpack` and `build`."""

    name: ClassVar[str]
    canonical: ClassVar[type[Quant]]
    format: ClassVar[str]  # that of `canonical`
    quantizes_activations: ClassVar[bool] = True
    runs_on: ClassVar[tuple[str, ...]] = ()
    slow_on: ClassVar[tuple[str, ...]] = ()
    fast_on: ClassVar[tuple[str, ...]] = ()
    packs_on: ClassVar[str] = ""
    proof_shapes: ClassVar[tuple[tuple[int, int], ...]] = ((960, 576), (576, 1536), (64, 32))
    _dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)
    _ops: ClassVar[tuple[str, ...]] = ()  # of vLLM's extension
    _needs_vnni: ClassVar[bool] = False
    _multiple: ClassVar[int] = 32  # of both N and K
    _groups: ClassVar[tuple[int, ...]] = ()  # input channels that may share a scale; empty: any number

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "canonical"):  # what several kernels share may leave it to them
            cls.format = cls.canonical.format

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype

    def unavailable(self) -> str:
        if self.dtype not in self._dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self._dtypes)
            return f"activations are {str(self.dtype).removeprefix('torch.')}, this kernel takes {names}"
        return self._no_device() or _missing(self._ops)

    def _no_device(self) -> str:
        """Why the kernel's operators would fail on this machine, or end the process."""
        return _no_vnni() if self._needs_vnni else ""

    def check_shape(self, n: int, k: int) -> None:
        for label, size in (("N", n), ("K", k)):
            if size <= 0 or size % self._multiple:
                raise KernelError(
                    f"{self.name}: {label}={size} of a weight [N={n}, K={k}] is not a positive multiple of "
                    f"{self._multiple}; leave this linear at base, or choose another tensor-parallel size"
                )
        if self.canonical is QuantW4:
            choose_group_size(k)

    def check_group(self, size: int) -> None:
        if self._groups and size not in self._groups:
            raise KernelError(
                f"{self.name}: group size {size}, it takes {self._groups}; make the checkpoint with one of them"
            )

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.dim() != 2 or weight.dtype not in (self.dtype, torch.float32):
            raise KernelError(
                f"{self.name} packs a {self.dtype} (or fp32) weight [N, K], got {weight.dtype} {tuple(weight.shape)}; "
                "choose the kernel with the model's dtype"
            )
        self.check_shape(*weight.shape)
        return self.pack_quant(round_in_pieces(self.canonical, weight, self._scale_dtype))

    def pack_quant(self, quant: Quant) -> dict[str, Tensor]:
        raise NotImplementedError

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        raise NotImplementedError

    def reference(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.unpack(tensors).dequantize()

    def activation_half_step(self, x: Tensor) -> Tensor:
        if not self.quantizes_activations:
            return torch.zeros_like(x, dtype=torch.float64)
        return (x.double().abs().amax(dim=1, keepdim=True) / _INT8_STEPS / 2).expand(x.shape)

    @property
    def _scale_dtype(self) -> torch.dtype:
        """Scales are rounded to what the kernel reads before the weights are rounded to them."""
        return torch.float32 if self.quantizes_activations else self.dtype

    def _admit_quant(self, quant: Quant) -> None:
        if type(quant) is not self.canonical:
            raise KernelError(
                f"{self.name} runs {self.format}, this weight is {quant.format}; name it under {quant.format}"
            )
        self.check_shape(*quant.q.shape)
        if isinstance(quant, QuantW4):
            self.check_group(quant.group_size)
