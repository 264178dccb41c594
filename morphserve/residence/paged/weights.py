"""Every half of a decoder layer in every format: its image on the host, and its own addresses on the device.

An address range is reserved once and never moves, so captured graphs and the model's parameters stay valid; pages come
with the format and go with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_resize import ArenaBacking, ByteRange, PagePool
from morphserve.residence.paged.copier import Copier
from morphserve.residence.paged.layout import Layout
from quant_layers import LayerTensors, Part


@dataclass(frozen=True, slots=True)
class _Image:
    layout: Layout
    host: Tensor  # int8 [layout.size_bytes]
    arena: ArenaBacking
    pages: ByteRange  # all of the arena


class WeightArena:
    """1. A part's tensors have the same addresses for ever.
    2. A `load` that raises has changed nothing.
    3. What `load` put there is what `add` was given, byte by byte.
    """

    def __init__(self, pool: PagePool, copier: Copier) -> None:
        self._pool = pool
        self._copier = copier
        self._images: dict[Part, _Image] = {}

    def add(self, part: Part, tensors: LayerTensors) -> None:
        """Keep `tensors` of one half on the host and reserve their addresses. Before serving.

        Raises:
            PageError: no address range.
        """
        layout = Layout.of(tensors)
        host = self._copier.host_memory(layout.size_bytes)
        layout.fill(host, tensors)
        arena = ArenaBacking(self._pool, layout.size_bytes, clears=False)
        end = -(-layout.size_bytes // arena.page_bytes) * arena.page_bytes
        self._images[part] = _Image(layout, host, arena, (0, end))

    def __contains__(self, part: Part) -> bool:
        return part in self._images

    def tensors(self, part: Part) -> dict[str, dict[str, Tensor]]:
        """Return views at the part's addresses. To be read only while it is loaded."""
        image = self._images[part]
        return image.layout.views(image.arena.buffer)

    def load(self, parts: list[Part]) -> None:
        """Map pages and copy, all parts or none. Returns when the bytes are there.

        Raises:
            BackingError: not enough pages are free.
        """
        mapped: list[Part] = []
        try:
            for part in parts:
                image = self._images[part]
                image.arena.populate([image.pages])
                mapped.append(part)
                self._copier.copy(image.arena.buffer, image.host)
            self._copier.finish()
        except BaseException:
            try:
                self._copier.finish()  # pages must not go while a copy is under way
            finally:
                self.unload(mapped)
            raise

    def unload(self, parts: list[Part]) -> None:
        """Give the pages back, once the work that was queued before is done."""
        for part in parts:
            image = self._images[part]
            image.arena.release([image.pages])

    def num_bytes(self, part: Part) -> int:
        """Return what it takes while it is loaded, in whole pages."""
        return self._images[part].pages[1]

    def resident_bytes(self) -> int:
        """Return the bytes of all pages that parts hold now."""
        return sum(image.arena.resident_bytes([image.pages]) for image in self._images.values())
