"""The one indirection of a morphable linear.

Eager: `apply` calls the slot's implementation. Compiled: torch.compile would trace that call away, and a
swap would be ignored or kill the worker (both seen on CPU), so the call goes through a custom op that
looks the slot up at run time. One compiled artifact then serves every level.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.utils.torch_utils import direct_register_custom_op

from quant_layers import LinearSlot

# One process holds one model; the index of a slot is the constant that the compiled graph keeps.
_SLOTS: list[LinearSlot] = []


def _morphserve_linear(x: torch.Tensor, slot: int, num_outputs: int) -> torch.Tensor:
    return _SLOTS[slot].impl(x)


def _morphserve_linear_fake(x: torch.Tensor, slot: int, num_outputs: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], num_outputs))


def register_op() -> None:
    """Register `torch.ops.vllm.morphserve_linear`. Re-entrant."""
    if not hasattr(torch.ops.vllm, "morphserve_linear"):
        direct_register_custom_op(
            "morphserve_linear", _morphserve_linear, fake_impl=_morphserve_linear_fake, dispatch_key="CPU"
        )


class MorphLinearMethod(UnquantizedLinearMethod):
    """`quant_method` of a morphable linear.

    It stays an UnquantizedLinearMethod because vLLM asks for that class in places, and because the layer
    must not announce an input quantization key (vllm/model_executor/layers/fusion/fused_act_quant.py).
    """

    def __init__(self, slot: LinearSlot, num_outputs: int) -> None:
        super().__init__()
        self.slot = slot
        self.num_outputs = num_outputs
        self.index = len(_SLOTS)
        _SLOTS.append(slot)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`bias` is already inside the implementation: it is the one that LinearBase.forward passes."""
        return self.slot.impl(x)


class OpaqueMorphLinearMethod(MorphLinearMethod):
    """The same under torch.compile."""

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.ops.vllm.morphserve_linear(x, self.index, self.num_outputs)


def method_class(vllm_config: Any) -> type[MorphLinearMethod]:
    """Which of the two this engine needs."""
    from vllm.config import CompilationMode

    compiled = vllm_config.compilation_config.mode not in (None, CompilationMode.NONE)
    if not compiled:
        return MorphLinearMethod
    register_op()
    return OpaqueMorphLinearMethod
