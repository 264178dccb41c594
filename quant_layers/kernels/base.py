"""What kernels share: the gates for dtypes, shapes, operators and CPUs, declared as class attributes."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant_layers.errors import KernelError
from quant_layers.formats.canonical import Quant, QuantW4, choose_group_size, round_in_pieces
from quant_layers.kernels.cpu_linears import LinearImpl

_INT8_STEPS = 127


def _missing(names: tuple[str, ...]) -> str:
    absent = [name for name in names if not hasattr(torch.ops._C, name)]
    return f"operators not loaded: {', '.join(absent)}" if absent else ""


_CPU_FEATURES = (("_is_vnni_supported", "AVX512-VNNI"), ("_is_avx512_bf16_supported", "AVX512-BF16"))


def _no_vnni() -> str:
    """Say why the VNNI kernels cannot run here, where they would end the process, uncatchably; else ''."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"needs an x86 CPU with AVX512-VNNI and AVX512-BF16, this is {platform.machine()}"
    for query, feature in _CPU_FEATURES:
        supported = getattr(torch.cpu, query, None)
        if supported is None or not supported():
            return f"this CPU has no {feature}"
    return ""


class KernelBase:
    """A `Kernel` (registry.py) without a layout: a subclass brings `lay_out`, `unpack` and `linear` or `build`."""

    name: ClassVar[str]
    canonical: ClassVar[type[Quant]]
    format: ClassVar[str]  # that of `canonical`
    quantizes_activations: ClassVar[bool] = True
    runs_on: ClassVar[tuple[str, ...]] = ()
    slow_on: ClassVar[tuple[str, ...]] = ()
    fast_on: ClassVar[tuple[str, ...]] = ()
    packs_on: ClassVar[str] = ""
    linear: ClassVar[Callable[[Mapping[str, Tensor], Tensor | None, torch.dtype], LinearImpl]]  # what `build` makes
    proof_shapes: ClassVar[tuple[tuple[int, int], ...]] = ((960, 576), (576, 1536), (64, 32))
    _dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)
    _ops: ClassVar[tuple[str, ...]] = ()  # of vLLM's extension
    _needs_vnni: ClassVar[bool] = False
    _multiples: ClassVar[tuple[int, int]] = (32, 32)  # of N and of K
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
        """Say why the kernel's operators would fail on this machine, or end the process."""
        return _no_vnni() if self._needs_vnni else ""

    def check_shape(self, n: int, k: int) -> None:
        for label, size, multiple in zip("NK", (n, k), self._multiples, strict=True):
            if size <= 0 or size % multiple:
                raise KernelError(
                    f"{self.name}: {label}={size} of a weight [N={n}, K={k}] is not a positive multiple of {multiple}; "
                    "leave this linear at base, or choose another tensor-parallel size"
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
        if type(quant) is not self.canonical:
            raise KernelError(
                f"{self.name} runs {self.format}, this weight is {quant.format}; name it under {quant.format}"
            )
        self.check_shape(*quant.q.shape)
        if isinstance(quant, QuantW4):
            self.check_group(quant.group_size)
        return self.lay_out(quant)

    def lay_out(self, quant: Any) -> dict[str, Tensor]:
        """Turn what fits, in the kernel's `canonical` form, into plain tensors that can be stored."""
        raise NotImplementedError

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        raise NotImplementedError

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return self.linear(tensors, bias, self.dtype)

    def reference(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.unpack(tensors).dequantize()

    def activation_half_step(self, x: Tensor) -> Tensor:
        if not self.quantizes_activations:
            return torch.zeros_like(x, dtype=torch.float64)
        return (x.double().abs().amax(dim=1, keepdim=True) / _INT8_STEPS / 2).expand(x.shape)

    @property
    def _scale_dtype(self) -> torch.dtype:
        """The dtype in which the kernel reads scales: they are rounded to it before the weights are rounded to them."""
        return torch.float32 if self.quantizes_activations else self.dtype
