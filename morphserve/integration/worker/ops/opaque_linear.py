"""The one indirection of a morphable linear.

Eager: `apply` calls the slot's implementation. Compiled: torch.compile would trace that call away, and a
swap would be ignored or kill the worker (both seen on CPU), so the call goes through a custom op that
looks the slot up at run time. One compiled artifact then serves every level.

The op has one name, `morphserve::linear`, and two implementations: native (csrc/opaque_linear.cpp) and
Python. A compiled artifact from the cache works with either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from morphserve.integration.worker.ops import native
from morphserve.residence import WeightSlot
from morphserve.residence import register_op as register_weight_op
from morphserve.residence import reset as reset_weight_slots
from quant_layers import LinearImpl, LinearSlot

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# One process holds one model; the index of a slot is the constant that the compiled graph keeps.
_SLOTS: list[LinearSlot] = []
_libraries: list[torch.library.Library] = []  # kept: a Library that is collected takes its ops with it
_is_native = False

_KINDS = {  # as in csrc/opaque_linear.cpp
    "onednn": 1,
    "int8_vnni": 2,
    "int4_vnni": 3,
    "int8_onednn": 4,
    "int16_w8_linear": 5,
    "int16_w4_linear": 6,
}


def _linear(x: torch.Tensor, slot: int, num_outputs: int) -> torch.Tensor:
    return _SLOTS[slot].impl(x)


def _linear_fake(x: torch.Tensor, slot: int, num_outputs: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], num_outputs))


def register_op(cache_dir: Path) -> None:
    """Register `morphserve::linear`. Re-entrant."""
    global _is_native
    if _libraries:
        return
    _is_native = native.load(cache_dir)
    library = torch.library.Library("morphserve", "FRAGMENT")
    if _is_native:
        library.impl("python_linear", _linear, "CPU")
    else:
        library.define("linear(Tensor x, int slot, int num_outputs) -> Tensor")
        library.impl("linear", _linear, "CPU")
    torch.library.register_fake("morphserve::linear", _linear_fake, lib=library)
    _libraries.append(library)


def reset() -> None:
    """Forget the slots of a model that this process held before: indices start at 0 for every model."""
    _SLOTS.clear()
    reset_weight_slots()


class OpaqueSlot(LinearSlot):
    """A slot that tells the native op of every switch.

    Storing an attribute, here as there, is all that a switch is: it cannot fail.
    """

    __slots__ = ("_impl", "_index", "_num_inputs")

    def __init__(
        self, name: str, impl: LinearImpl, format: str, bias: torch.Tensor | None, num_inputs: int
    ) -> None:
        self._index = len(_SLOTS)
        self._num_inputs = num_inputs
        _SLOTS.append(self)
        super().__init__(name, impl, format, bias)

    @property
    def impl(self) -> LinearImpl:  # type: ignore[override]
        """What the next forward pass calls."""
        return self._impl

    @impl.setter
    def impl(self, impl: LinearImpl) -> None:
        self._impl = impl
        if not _is_native:
            return
        kind, tensors, bias = getattr(impl, "native", None) or ("python", (), None)
        torch.ops.morphserve.set_slot(
            self._index, _KINDS.get(kind, 0), self._num_inputs, list(tensors), bias
        )

    @property
    def index(self) -> int:
        """The constant in the compiled graph."""
        return self._index


class MorphLinearMethod(UnquantizedLinearMethod):
    """`quant_method` of a morphable linear.

    It stays an UnquantizedLinearMethod because vLLM asks for that class in places, and because the layer
    must not announce an input quantization key (vllm/model_executor/layers/fusion/fused_act_quant.py).
    """

    def __init__(self, slot: LinearSlot) -> None:
        super().__init__()
        self.slot = slot

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the linear; `bias` is already inside the implementation: the one that LinearBase.forward passes."""
        return self.slot.impl(x)


class OpaqueMorphLinearMethod(UnquantizedLinearMethod):
    """The same under torch.compile."""

    def __init__(self, slot: OpaqueSlot, num_outputs: int) -> None:
        super().__init__()
        self._slot_index = slot.index
        self._num_outputs = num_outputs

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the linear as in eager mode, past the tracer."""
        return torch.ops.morphserve.linear(x, self._slot_index, self._num_outputs)


class WeightLinearMethod(UnquantizedLinearMethod):
    """The same for a weight whose address never changes: it says which linear is meant."""

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the linear as in eager mode, past the tracer."""
        return torch.ops.morphserve.linear_of(x, layer.weight)


def is_compiled(vllm_config: VllmConfig) -> bool:
    """Return whether vLLM compiles the model."""
    from vllm.config import CompilationMode

    return vllm_config.compilation_config.mode not in (None, CompilationMode.NONE)


@dataclass(frozen=True, slots=True)
class Place:
    """How an engine reaches its linears.

    Attributes:
        is_compiled: through an operator that torch.compile does not look into.
        has_addresses: weights keep their addresses, so the operator finds a linear by that of its weight.
        cache_dir: for what is built of our own operators.
    """

    is_compiled: bool
    has_addresses: bool
    cache_dir: Path


def install(place: Place, linear: LinearBase, slot: LinearSlot) -> LinearSlot:
    """Give `linear` the method that goes through its slot, and return the slot, of the kind that the engine needs."""
    if not place.is_compiled:
        linear.quant_method = MorphLinearMethod(slot)
        return slot
    if place.has_addresses:
        register_weight_op()
        linear.quant_method = WeightLinearMethod()
        return WeightSlot(slot.name, slot.impl, linear.weight, slot.format, slot.bias)
    register_op(place.cache_dir)
    opaque = OpaqueSlot(slot.name, slot.impl, slot.format, slot.bias, linear.input_size_per_partition)
    linear.quant_method = OpaqueMorphLinearMethod(opaque, num_outputs(linear))
    return opaque


def num_outputs(linear: LinearBase) -> int:
    """Return N of this rank's slice."""
    return int(getattr(linear, "output_size_per_partition", linear.output_size))
