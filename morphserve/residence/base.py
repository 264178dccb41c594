"""What a rank asks of the place where its layers and KV blocks have their bytes. Two places keep it: host and paged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from kv_resize import ElasticCache, KVGeometry
from quant_layers import Build, Kernel, LayerTensors, LinearImpl, LoadedPart, Part, PartSource


class BaseLinear(Protocol):
    """One linear of the model on this rank at level 0, with what it takes to store, replace and restore it."""

    method: str  # how the weights were loaded, for messages
    bits: int  # of a weight
    opaque: bool  # an operator to torch.compile in stock vLLM too: only then a compiled level 0 is stock

    @property
    def bias(self) -> Tensor | None:
        """That its forward adds on this rank; the model keeps it at every level."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return what defines it, as loaded, fused and sliced. Before vLLM packs it."""
        ...

    def weight(self) -> Tensor:
        """Return what variants are made from: [N, K], in the model's dtype or fp32. Before vLLM packs it."""
        ...

    def take(self) -> LinearImpl:
        """Return vLLM's own implementation, which from then on belongs to the caller. After vLLM packed it."""
        ...

    def build(self, tensors: Mapping[str, Tensor]) -> LinearImpl:
        """Return the same implementation again, from stored `tensors`."""
        ...


@dataclass(frozen=True, slots=True)
class PartsKey:
    """What makes packed layers the same ones at another start.

    Attributes:
        cache_dir: that everything of this kind lies under.
        fingerprint: gives a digest of the weights as loaded, on this rank.
        layouts: format |-> the kernel, and what was done to the weights before it packed them.
        kernels: format |-> its kernel.
    """

    cache_dir: Path
    fingerprint: Callable[[], str]
    layouts: Mapping[str, str]
    kernels: Mapping[str, Kernel]


class Parts(PartSource, Protocol):
    """A rank's layers in all formats, outside of the memory that serves."""

    directory: Path | None  # where figures that were measured of them may be kept; None = nowhere

    def keep(self, layer: int, fmt: str, pack: Callable[[], LayerTensors]) -> None:
        """Keep a layer in a format; `pack` is asked only where it is not kept already.

        Raises:
            StoreError, BackingError: there is no room.
        """
        ...

    def seal(self) -> None:
        """Check what is kept, once all of it is, and have packed again what is damaged.

        Raises:
            StoreError: it is damaged, again.
        """
        ...

    @property
    def scratch_bytes(self) -> int:
        """Most that a linear takes while it is built, beside what it is built from."""
        ...

    def adopt(self, part: Part, bases: Mapping[str, BaseLinear]) -> LoadedPart:
        """Take over half a layer that vLLM has loaded, at level 0."""
        ...

    def num_bytes(self, part: Part) -> int:
        """Return what a part takes while it is in memory; 0 where there is none of it."""
        ...


@dataclass(frozen=True, slots=True)
class RankSizes:
    """What of a rank's model and KV cache says how large pages are to be.

    Attributes:
        num_layers: decoder layers of the rank, each of which has blocks of the KV cache.
        layer_bytes: of a layer as loaded, about.
        block_bytes: of a block of the KV cache in one layer.
    """

    num_layers: int
    layer_bytes: int
    block_bytes: int


class Residence(Protocol):
    """Where a rank's layers and KV blocks have their bytes.

    One rank's; lives as long as its process. What of a transition takes memory, or waits for a device, runs on
    `background`: at once on the host, on a thread beside the forward passes where memory goes by the page.
    """

    in_pages: ClassVar[bool]  # layers and KV blocks exchange pages of a device

    @property
    def background(self) -> Executor:
        """Executor of one thread."""
        ...

    @property
    def device_type(self) -> str:
        """Type of torch's device that kernels run on."""
        ...

    @property
    def page_bytes(self) -> int | None:
        """Size of what layers and KV blocks exchange; None where the system has all pages."""
        ...

    @classmethod
    def open(cls, device: torch.device, forward_stream: Callable[[], object], sizes: RankSizes) -> Residence:
        """Open a rank's memory; nothing is allocated yet.

        Args:
            device: that vLLM loads the model on.
            forward_stream: gives the stream of the forward passes; asked for once, and only where there are streams.
            sizes: of the rank's model and KV cache.

        Raises:
            PageError: no such device, or a library for it is missing.
        """
        ...

    def open_parts(self, key: PartsKey, build: Build) -> Parts:
        """Return what keeps the layers in all formats.

        Raises:
            StoreError: what is kept on disk under this key cannot be used.
        """
        ...

    def loading(self) -> AbstractContextManager[None]:
        """Inside, vLLM makes the weights that will be swapped out."""
        ...

    def loaded(self, model: torch.nn.Module) -> None:
        """Prepare the loaded tensors of a model for being dropped one by one."""
        ...

    def reserve(
        self, sizes: Mapping[str, Sequence[int]], least: int, most: int, memory_share: float, kv_bytes: int | None
    ) -> int | None:
        """Take the memory that layers are staged in.

        Args:
            sizes: format |-> bytes of each layer.
            least: layers that must fit in at once.
            most: that shall, where they take a small share of the device, and of what the weights leave for KV.
            memory_share: of the device's memory, that the engine may use.
            kv_bytes: that it was told to use for KV, whatever that share is.

        Returns:
            Bytes taken; None where layers are built wherever the system has room.

        Raises:
            BackingError: the device has no room for the least.
        """
        ...

    def open_cache(self, geometry: KVGeometry, num_blocks: int) -> ElasticCache:
        """Return the KV cache for a geometry, with memory for `num_blocks` at most until somebody maps more.

        Raises:
            BackingError: there is no room for that.
        """
        ...

    def extend_cache(self, cache: ElasticCache, num_blocks: int) -> None:
        """Map blocks up to `num_blocks` on memory that no layer gave up. Before serving.

        Raises:
            BackingError, MapError: there is no room for that; the cache is as it was.
        """
        ...

    def keep_free(self, num_bytes: int, num_ranks: int) -> None:
        """Map no KV blocks that would leave less memory than this, where so many ranks of one host map at once."""
        ...

    def wait(self) -> None:
        """Return when everything that was queued on the device is done."""
        ...

    def fence(self) -> AbstractContextManager[None]:
        """Note what is queued on the device now. Inside the context, pages are given back as soon as that is done."""
        ...

    def finish(self) -> None:
        """Return when what the background thread has queued on the device is done."""
        ...

    def trim(self) -> None:
        """Return to the system what an idle process need not hold."""
        ...

    def figures(self) -> dict[str, int]:
        """Return bytes that the ledger does not see, by name. For tests and the status page."""
        ...

    def close(self) -> None:
        """Give everything back. Nothing of the engine may be used any more."""
        ...
