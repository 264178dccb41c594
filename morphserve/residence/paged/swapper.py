"""Switching decoder layers between formats on a device: their pages come before the switch and go after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from torch import Tensor

from morphserve.residence.paged.weights import Part, WeightArena
from quant_layers import (
    BASE,
    HALVES,
    Half,
    LinearImpl,
    LinearSlot,
    SwapError,
    TensorSlot,
    format_of,
    half_of,
    join_format,
    split_format,
)

# (layer, linear name, format of its half, tensors at the part's addresses) -> what the forward pass calls
Build = Callable[[int, str, str, Mapping[str, Tensor]], LinearImpl]


class DeviceSwapper:
    """`quant_layers.LayerSwapper` for memory that goes by the page.

    1. Between `prepare` and `commit` nothing that the forward path reads has changed.
    2. A `prepare` that raises leaves nothing staged, and every page where it was.
    3. `commit` only stores attributes and copies small tensors.
    4. A part's pages go in `reclaim`, when the work that was queued before its switch is done.

    `commit` belongs between two forward passes, on their thread; everything else on one other thread, in order.
    """

    def __init__(
        self,
        slots: Mapping[int, Mapping[str, LinearSlot]],
        arena: WeightArena,
        build: Build,
        tensors: Mapping[int, Mapping[str, TensorSlot]] = MappingProxyType({}),
        variant_tensors: Mapping[tuple[int, str, str], Tensor] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            slots: by decoder layer id and linear name, all at their base, whose parts are loaded.
            arena: holds every part that will be asked for.
            build: makes a linear of tensors; its result is kept, and used whenever the part is loaded.
            tensors: norms and the like that variants bring their own values for, by layer and name.
            variant_tensors: those values, on the device, by (layer, name, format); the base's where there are none.
        """
        self._slots = slots
        self._arena = arena
        self._build = build
        self._tensors = tensors
        self._variant_tensors = variant_tensors
        self._impls: dict[tuple[Part, str], LinearImpl] = {}
        self._live: dict[tuple[int, Half], Part] = {}
        self._staged: list[Part] = []
        self._replaced: list[Part] = []  # still mapped: steps under way may read them
        self._prepared = False
        for layer, linears in slots.items():
            for name, slot in linears.items():
                part = Part(layer, half_of(name), BASE)
                self._live[layer, part.half] = part
                self._impls[part, name] = slot.impl

    @property
    def resident_bytes(self) -> int:
        """Bytes of the parts in use, in whole pages."""
        return self._bytes(self._live.values())

    @property
    def staging_bytes(self) -> int:
        """Bytes mapped for parts that are not in use yet, or not any more."""
        return self._bytes(self._staged) + self._bytes(self._replaced)

    def formats(self) -> dict[int, str]:
        """Format in use, by layer id."""
        found = {}
        for layer in self._slots:
            halves = [self._live.get((layer, half)) for half in HALVES]
            known = [part.format for part in halves if part is not None]
            found[layer] = join_format(known[0], known[-1])
        return found

    def prepare(self, changes: Mapping[int, str]) -> None:
        """Bring the given layers in their new formats; returns when they are there.

        Raises:
            SwapError: something is prepared already, or a layer or format is unknown.
            BackingError, KernelError: no pages, or a kernel refuses; nothing stays staged.
        """
        if self._prepared:
            raise SwapError(
                f"{len(self._staged)} parts of layers are prepared already, the limit is one change at a time; "
                "commit or abort it before the next prepare"
            )
        self.reclaim()
        parts = [part for layer, fmt in changes.items() for part in self._changed(layer, fmt)]
        self._arena.load(parts)
        try:
            for part in parts:
                self._build_part(part)
        except BaseException:
            self._arena.unload(parts)
            raise
        self._staged, self._prepared = parts, True

    def commit(self) -> None:
        """Put everything staged in use. What it replaces keeps its pages until `reclaim`.

        Raises:
            SwapError: nothing is prepared.
        """
        if not self._prepared:
            raise SwapError("nothing is prepared; call prepare before commit")
        staged, self._staged, self._prepared = self._staged, [], False
        for part in staged:
            for name, slot in self._linears(part):
                slot.impl = self._impls[part, name]
                slot.format = part.format
            for name, tensor in self._tensors.get(part.layer, {}).items():
                if half_of(name) == part.half:
                    tensor.live.copy_(self._variant_tensors.get((part.layer, name, part.format), tensor.base))
            self._replaced.append(self._live[part.layer, part.half])
            self._live[part.layer, part.half] = part

    def reclaim(self) -> None:
        """Give the pages of what was replaced back, once no step under way reads them."""
        replaced, self._replaced = self._replaced, []
        self._arena.unload(replaced)

    def abort(self) -> None:
        """Drop everything staged. Harmless when nothing is."""
        staged, self._staged, self._prepared = self._staged, [], False
        self._arena.unload(staged)

    def _changed(self, layer: int, layer_format: str) -> list[Part]:
        """The halves of a layer that are not in their new format yet."""
        if layer not in self._slots:
            raise SwapError(f"layer {layer} is not morphable; morphable are {sorted(self._slots)}")
        parts = []
        for half, fmt in zip(HALVES, split_format(layer_format), strict=True):
            live, part = self._live.get((layer, half)), Part(layer, half, fmt)
            if live is None or live == part:
                continue
            if part not in self._arena:
                raise SwapError(f"layer {layer}: format {fmt!r} of its {half} was not made; add it to ladder.steps")
            parts.append(part)
        return parts

    def _build_part(self, part: Part) -> None:
        for name, tensors in self._arena.tensors(part).items():
            if (part, name) not in self._impls:
                self._impls[part, name] = self._build(part.layer, name, part.format, tensors)

    def _linears(self, part: Part) -> Iterable[tuple[str, LinearSlot]]:
        return ((name, slot) for name, slot in self._slots[part.layer].items() if half_of(name) == part.half)

    def _bytes(self, parts: Iterable[Part]) -> int:
        return sum(self._arena.num_bytes(part) for part in parts)


def layer_bytes(arena: WeightArena, slots: Mapping[str, LinearSlot], layer: int, layer_format: str) -> int:
    """Bytes of one layer in a format, in whole pages."""
    halves = {half_of(name): format_of(layer_format, name) for name in slots}
    return sum(arena.num_bytes(Part(layer, half, fmt)) for half, fmt in halves.items())
