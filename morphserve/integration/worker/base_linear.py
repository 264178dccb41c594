"""What a decoder linear is at level 0: vLLM's own, whatever the weights were loaded as.

vLLM packs a weight for its kernel right after loading and drops the tensor. So each linear is seen twice: before,
when its tensors can be stored and variants be made from them, and after, when what vLLM built is taken over. Level
0 is rebuilt from the stored tensors by the very function of vLLM that built it first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import ScaledMMLinearKernel
from vllm.model_executor.layers.fusion.quant_activation import get_input_quant_key
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Fp8,
    CompressedTensorsW8A8Int8,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.utils.torch_utils import set_default_torch_dtype

from morphserve.residence import BaseLinear
from quant_layers import BIAS, KernelError, LinearImpl, Native

_WEIGHT, _SCALE = "weight", "weight_scale"


def base_of(linear: LinearBase, in_pages: bool) -> BaseLinear | None:
    """Return what a linear is at level 0; None when vLLM runs it in a way that cannot be taken apart here.

    Args:
        linear: as loaded, before vLLM packs it.
        in_pages: its weight will lie at an address that never changes, see `PagedBase`.
    """
    if in_pages:
        return PagedBase(linear) if isinstance(linear.quant_method, UnquantizedLinearMethod) else None
    if isinstance(linear.quant_method, UnquantizedLinearMethod):
        return UnquantizedBase(linear)
    return ScaledBase(linear) if ScaledBase.fits(linear) else None


def method_of(linear: LinearBase) -> str:
    """Return the names of vLLM's classes that run the linear."""
    scheme = getattr(linear, "scheme", None)
    return type(linear.quant_method).__name__ + ("" if scheme is None else f" ({type(scheme).__name__})")


def applied_bias(linear: LinearBase) -> Tensor | None:
    """Return the bias that this linear's forward hands to `apply` (vllm/model_executor/layers/linear.py)."""
    bias = getattr(linear, BIAS, None)
    if bias is None or linear.skip_bias_add:
        return None
    # RowParallelLinear adds the bias on one tensor-parallel rank only, before the all-reduce.
    if getattr(linear, "input_is_parallel", False) and linear.tp_rank > 0:
        return None
    return bias


def _with_bias(tensors: dict[str, Tensor], linear: LinearBase) -> dict[str, Tensor]:
    bias = applied_bias(linear)
    return tensors if bias is None else tensors | {BIAS: bias.data}


class UnquantizedImpl:
    """vLLM's own full-precision linear, as a callable that owns the matmul, or the weight that it multiplies by."""

    __slots__ = ("_bias", "_linear", "_weight", "native", "nbytes")

    def __init__(self, linear: LinearBase, weight: Tensor | None, bias: Tensor | None, nbytes: int) -> None:
        """
        Args:
            linear: the function of (x, weight, bias) that vLLM made.
            weight: [N, K], where vLLM did not pack it into `linear`.
            bias: that the model's own module keeps.
            nbytes: of the weight, packed or not.
        """
        self._linear, self._weight, self._bias, self.nbytes = linear, weight, bias, nbytes
        handler = _onednn_handler(linear)
        self.native = None if handler is None else ("onednn", (handler,), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x, self._weight, self._bias)

    @property
    def runs_in(self) -> str:
        """What multiplies, for messages."""
        if self._weight is not None:
            return "torch"
        return "vLLM's own" if self.native is None else "oneDNN"


def _onednn_handler(linear: LinearBase) -> Tensor | None:
    """Return the tensor by which vLLM's closure names its oneDNN matmul; None when it chose another kernel.

    Only a shortcut for the native op: without it the closure itself is called.
    """
    for cell in getattr(linear, "__closure__", None) or ():
        handler = getattr(cell.cell_contents, "handler_tensor", None)
        if isinstance(handler, Tensor):
            return handler
    return None


class UnquantizedBase:
    """bf16, fp16 or fp32 weights, as vLLM's CPU backend runs them (dispatch_cpu_unquantized_gemm).

    It packs a weight into an opaque matmul where oneDNN has one for the dtype on this CPU. Elsewhere (bf16 without
    AVX-512, fp16 without its instructions) it keeps the tensor and calls torch's linear: then the tensor is what goes
    and comes back.
    """

    opaque = True

    def __init__(self, linear: LinearBase) -> None:
        self._linear = linear
        self._is_kept = False  # the weight, as a tensor; known when vLLM has packed what it packs
        self.method = method_of(linear)
        self.bits = linear.weight.dtype.itemsize * 8

    @property
    def bias(self) -> Tensor | None:
        return applied_bias(self._linear)

    def tensors(self) -> dict[str, Tensor]:
        return _with_bias({_WEIGHT: self._linear.weight.data}, self._linear)

    def weight(self) -> Tensor:
        return self._linear.weight.data

    def take(self) -> LinearImpl:
        linear = self._linear
        num_outputs = int(getattr(linear, "output_size_per_partition", linear.output_size))
        nbytes = num_outputs * linear.input_size_per_partition * linear.params_dtype.itemsize
        weight = _weight_of(linear)
        self._is_kept = weight is not None
        if self._is_kept:
            linear.weight = torch.nn.Parameter(linear.weight.new_empty(0), requires_grad=False)  # as where it packs
        return UnquantizedImpl(linear.__dict__.pop("cpu_linear"), weight, applied_bias(linear), nbytes)

    def build(self, tensors: Mapping[str, Tensor]) -> LinearImpl:
        bias = applied_bias(self._linear)  # the module keeps it at every level: no second copy
        shadow: Any = SimpleNamespace(weight=torch.nn.Parameter(tensors[_WEIGHT], requires_grad=False), bias=bias)
        nbytes = tensors[_WEIGHT].nbytes
        dispatch_cpu_unquantized_gemm(shadow, remove_weight=True)
        weight = _weight_of(shadow)
        if (weight is not None) != self._is_kept:
            # vLLM swallows the failure and falls back to a matmul on the tensor: not what level 0 runs.
            raise KernelError(f"{self._linear.prefix}: vLLM could not build its matmul (out of memory?)")
        return UnquantizedImpl(shadow.cpu_linear, weight, bias, nbytes)


def _weight_of(linear: LinearBase) -> Tensor | None:
    """Return the weight that vLLM kept beside its matmul; None where it is inside of it."""
    return linear.weight.data if linear.weight.numel() else None


class ScaledImpl:
    """vLLM's own quantized linear: its method applied to a module that nobody else has.

    Dropping it frees the packed weight at once. vLLM's kernel holds a bound method of itself, so its count of
    references never falls to zero: the weight would stay until Python looks for cycles.
    """

    __slots__ = ("_bias", "_kernels", "_method", "_module", "native", "nbytes")

    def __init__(self, method: Any, module: LinearBase, bias: Tensor | None, weight_bytes: int) -> None:
        """
        Args:
            method: vLLM's, for `module`.
            module: after packing.
            bias: that the model's own module keeps.
            weight_bytes: of the weight, where packing took it out of the module.
        """
        self._method, self._module, self._bias = method, module, bias
        self._kernels = tuple(kernel for _, kernel in _kernels(module.scheme))
        kept = {name: p.nbytes for name, p in module.named_parameters() if name != BIAS}
        self.nbytes = sum(kept.values()) + (0 if _WEIGHT in kept else weight_bytes)
        self.native = _native(module, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._method.apply(self._module, x, self._bias)

    def __del__(self) -> None:
        for kernel in self._kernels:
            kernel.__dict__.clear()


def _native(module: LinearBase, bias: Tensor | None) -> Native | None:
    """Return what oneDNN's int8 matmul is called with; None when vLLM runs another. Only a shortcut, as above."""
    scheme = module.scheme
    if not isinstance(scheme, CompressedTensorsW8A8Int8) or scheme.is_static_input_scheme or not scheme.input_symmetric:
        return None
    adjust = getattr(module, "azp_adj", None)  # passed on as vLLM does; unused without zero points
    for _, kernel in _kernels(scheme):
        handler = getattr(getattr(kernel, "dnnl_handler", None), "handler_tensor", None)
        if isinstance(handler, Tensor) and isinstance(adjust, Tensor):
            return "int8_onednn", (handler, adjust), bias
    return None


class ScaledBase:
    """8-bit weights with a scale for every row or for a whole matrix, through vLLM's quantized kernels."""

    bits = 8

    @staticmethod
    def fits(linear: LinearBase) -> bool:
        """Return whether the loaded parameters say all: integers or floats of 8 bits, and scales."""
        scheme = getattr(linear, "scheme", None)
        return (
            type(linear.quant_method) is CompressedTensorsLinearMethod  # not those that transform activations too
            and isinstance(scheme, CompressedTensorsW8A8Int8 | CompressedTensorsW8A8Fp8)
            and scheme.strategy in ("channel", "tensor")
            # The layer before would hand over activations that it quantized: no variant could read them.
            and get_input_quant_key(linear) is None
        )

    def __init__(self, linear: LinearBase) -> None:
        """Keep the parameters, before vLLM packs them."""
        self._linear = linear
        self._method = linear.quant_method
        self.method = method_of(linear)
        self.opaque = isinstance(linear.scheme, CompressedTensorsW8A8Int8)  # float8 is plain torch on CPU
        self._names = tuple(name for name, p in linear.named_parameters() if name != BIAS)
        self._unpacked = _copy(linear)  # what packing starts from, parameters left out
        self._unpacked.scheme = _copy_scheme(linear.scheme)
        for name in self._names:
            self._unpacked._parameters[name] = None

    @property
    def bias(self) -> Tensor | None:
        return applied_bias(self._linear)

    def tensors(self) -> dict[str, Tensor]:
        return _with_bias({name: getattr(self._linear, name).data for name in self._names}, self._linear)

    def weight(self) -> Tensor:
        linear = self._linear
        return dequantize(linear.weight.data, linear.weight_scale.data, linear.logical_widths)

    def take(self) -> LinearImpl:
        linear, module = self._linear, _copy(self._linear)
        linear.scheme = None
        for name in [name for name, _ in linear.named_parameters() if name != BIAS]:
            linear._parameters[name] = None
        num_weights = sum(linear.logical_widths) * linear.input_size_per_partition
        return ScaledImpl(self._method, module, applied_bias(linear), num_weights)

    def build(self, tensors: Mapping[str, Tensor]) -> LinearImpl:
        module = _copy(self._unpacked)
        module.scheme = _copy_scheme(module.scheme)
        for name in self._names:
            module._parameters[name] = torch.nn.Parameter(tensors[name], requires_grad=False)
        with set_default_torch_dtype(self._linear.params_dtype):  # as when vLLM loads: kernels take it for outputs
            self._method.process_weights_after_loading(module)
        return ScaledImpl(self._method, module, applied_bias(self._linear), tensors[_WEIGHT].nbytes)


class PagedImpl:
    """vLLM's own linear on the parameter, which lies in the arena: what level 0 of the stock server runs."""

    __slots__ = ("_bias", "_linear", "_method", "nbytes")

    def __init__(self, method: Any, linear: LinearBase, bias: Tensor | None) -> None:
        self._method, self._linear, self._bias = method, linear, bias
        self.nbytes = linear.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self._method.apply(self._linear, x, self._bias)


class PagedBase:
    """bf16 or fp16 weights on a device, which vLLM leaves as they were loaded: the parameter moves into an arena."""

    opaque = True

    def __init__(self, linear: LinearBase) -> None:
        self._linear = linear
        self._impl: PagedImpl | None = None
        self.method = method_of(linear)
        self.bits = linear.weight.dtype.itemsize * 8
        if linear.weight.device.type == "cpu":  # pages of host memory: vLLM must not pack what is to stay a tensor
            linear._cpu_skip_gemm_dispatch = True

    @property
    def bias(self) -> Tensor | None:
        return applied_bias(self._linear)

    def tensors(self) -> dict[str, Tensor]:
        """Return the weight alone: the bias stays where it is."""
        return {_WEIGHT: self._linear.weight.data}

    def weight(self) -> Tensor:
        return self._linear.weight.data

    def take(self) -> LinearImpl:
        return self.build(self.tensors())

    def build(self, tensors: Mapping[str, Tensor]) -> LinearImpl:
        """Make `tensors` the parameter's own, once; from then on it stays at their addresses."""
        if self._impl is None:
            self._linear.weight.data = tensors[_WEIGHT]
            self._impl = PagedImpl(self._linear.quant_method, self._linear, self.bias)
        return self._impl


def _copy(module: LinearBase) -> LinearBase:
    """Another module over the same tensors; giving it others leaves the first as it is."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    return twin


def _copy_scheme(scheme: Any) -> Any:
    """Scheme and kernel before packing: vLLM keeps what it packs in the kernel."""
    twin = copy.copy(scheme)
    for name, kernel in _kernels(scheme):
        setattr(twin, name, copy.copy(kernel))
    return twin


def _kernels(scheme: Any) -> Iterator[tuple[str, Any]]:
    """Yield a scheme's kernels: each scheme has another name for its own."""
    return ((name, value) for name, value in vars(scheme).items() if isinstance(value, ScaledMMLinearKernel))


def dequantize(weight: Tensor, scale: Tensor, widths: list[int]) -> Tensor:
    """Return what an 8-bit weight means: fp32 [N, K].

    Args:
        weight: [N, K], int8 or float8.
        scale: of every row ([N, 1]), or of each of the matrices that were fused into one.
        widths: rows of each of those.
    """
    if scale.numel() != len(weight):
        scale = scale.reshape(-1).repeat_interleave(torch.tensor(widths))
    return weight.float() * scale.float().reshape(-1, 1)
