"""Where the tensors of half a layer lie in one stretch of memory, on the host and on the device alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_layers import LayerTensors

ALIGNMENT_BYTES = 256  # what CUDA's own allocator gives, and more than any kernel here asks for


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor, rows contiguous."""

    offset: int  # byte
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Without what alignment adds."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """Return the tensor in `memory`, int8 [size_bytes of the layout]. Reads nothing."""
        return memory[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """One copy from the host brings all of it."""

    places: Mapping[str, Mapping[str, Place]]  # linear |-> name |-> place
    size_bytes: int

    @classmethod
    def of(cls, tensors: LayerTensors) -> Layout:
        """Lay tensors one behind the other, aligned."""
        places: dict[str, dict[str, Place]] = {}
        end = 0
        for linear, parts in tensors.items():
            for name, tensor in parts.items():
                start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                place = Place(start, tuple(tensor.shape), tensor.dtype)
                places.setdefault(linear, {})[name] = place
                end = start + place.num_bytes
        return cls(places, end)

    def views(self, memory: Tensor) -> dict[str, dict[str, Tensor]]:
        """Return all tensors, as views of `memory`, int8 of at least `size_bytes`. Reads nothing."""
        return {
            linear: {name: place.view(memory) for name, place in parts.items()} for linear, parts in self.places.items()
        }

    def fill(self, memory: Tensor, tensors: LayerTensors) -> None:
        """Write the tensors into `memory`, from whatever device they are on."""
        for linear, parts in self.views(memory).items():
            for name, view in parts.items():
                view.copy_(tensors[linear][name])
