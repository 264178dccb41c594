"""The opaque linear of the CUDA path: `torch.ops.morphserve.linear_of(x, weight) -> y`.

On CUDA a morphable weight lies in a range of addresses that is reserved for as long as the engine lives, so the
weight itself says which linear is meant: its address is the key under which the slot is found at run time. The graph
that torch.compile keeps holds neither a layer's name nor a number, so the pieces of different layers are the same
piece: one is compiled for all layers, and for all levels.

The weight is an address here and nothing more. Its pages may be unmapped while the layer is quantized, so neither
the operator nor its fake may read a byte of it; and since CUDA graphs are captured through it, it must not wait for the
device. Under replay the operator does not run at all: the graph keeps the kernels of the format it was captured at,
which is why graphs are kept in graph sets (graph_sets.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch

from morphserve.residence.errors import WeightError
from quant_layers import BASE, LinearImpl, LinearSlot

NAMESPACE = "morphserve"  # shared with the operators of worker/ops/opaque_linear.py, which this knows nothing of
_DEVICES = ("CPU", "CUDA")


class _Slots(dict[int, "WeightSlot"]):
    """By address. An address that is not here is an error in words, at no cost to those that are."""

    def __missing__(self, address: int) -> WeightSlot:
        raise WeightError(
            f"no linear is registered for the weight at {address:#x}, {len(self)} others are; make its WeightSlot once "
            "the weight has its final address, and again if it has been given another since"
        )


_slots = _Slots()  # one process holds one model
_used: set[int] | None = None  # while somebody watches
_libraries: list[torch.library.Library] = []  # kept: a Library that is collected takes its ops with it


class WeightSlot(LinearSlot):
    """One morphable linear, found by the address of its weight."""

    __slots__ = ("_weight", "address")

    def __init__(
        self,
        name: str,
        impl: LinearImpl,
        weight: torch.Tensor,
        format: str = BASE,
        bias: torch.Tensor | None = None,
    ) -> None:
        """
        Args:
            impl: gives [..., N] in the dtype of its input, contiguous and new, whatever the format.
            weight: [N, K], the very tensor that the model passes to the operator.
            bias: passed to every variant by the swapper. It is inside the implementations; the operator has none.

        Raises:
            WeightError: the weight has no address or not two dimensions, or a slot has that address already.
        """
        super().__init__(name, impl, format, bias)
        # Shares the storage, so that nobody else is given the address while the slot is registered.
        self._weight = weight.detach()
        self.address = _address(name, weight)
        other = _slots.get(self.address)
        if other is not None:
            raise WeightError(
                f"{name!r} has its weight at {self.address:#x}, where that of {other.name!r} lies; one per "
                "address is the limit. Keep tied weights out of the ladder; call reset() before another model comes"
            )
        _slots[self.address] = self


def _address(name: str, weight: torch.Tensor) -> int:
    address = 0 if weight.device.type == "meta" else weight.data_ptr()
    if weight.dim() != 2 or not address:
        raise WeightError(
            f"{name!r} has a weight of shape {list(weight.shape)} on {weight.device} at {address:#x}; the limit is a "
            "weight [N, K] with memory of its own. Register it after it was loaded and placed"
        )
    return address


def slots() -> Mapping[int, WeightSlot]:
    """Return all slots, by the address of their weight. A live view."""
    return MappingProxyType(_slots)


def reset() -> None:
    """Forget the model that this process held before."""
    _slots.clear()


@contextmanager
def addresses_used() -> Iterator[set[int]]:
    """Note the addresses of the weights whose linears run while it is open, also under capture. Does not nest."""
    global _used
    _used = set()
    try:
        yield _used
    finally:
        _used = None


def _linear_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    address = weight.data_ptr()
    if _used is not None:
        _used.add(address)
    return _slots[address].impl(x)


def _linear_of_fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def register_op() -> None:
    """Register `morphserve::linear_of`. Re-entrant."""
    if _libraries:
        return
    library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("linear_of(Tensor x, Tensor weight) -> Tensor")
    for device in _DEVICES:
        library.impl("linear_of", _linear_of, device)
    torch.library.register_fake(f"{NAMESPACE}::linear_of", _linear_of_fake, lib=library)
    _libraries.append(library)
