"""Switching decoder layers between formats on one rank: prepare may fail, commit cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from quant_layers.errors import SwapError
from quant_layers.formats.halves import BASE, HALVES, Half, half_of, join_format, split_format
from quant_layers.kernels.cpu_linears import LinearImpl
from quant_layers.likeness import HalfLayer, Look

BIAS = "bias"  # tensor name under which a variant stores a bias that is not the base's
SOURCE_MARK = "+"  # in a stored layer's kernel name: what comes after it says how the weights were prepared
# (layer, linear name, format, its tensors) -> what the forward pass calls
Build = Callable[[int, str, str, dict[str, Tensor]], LinearImpl]


@dataclass(slots=True, eq=False)
class LinearSlot:
    """A morphable linear. The forward path calls `slot.impl(x)`, looked up anew on each call."""

    name: str
    impl: LinearImpl
    format: str = BASE
    bias: Tensor | None = None  # passed to every variant; the base brings its own


@dataclass(slots=True, eq=False)
class TensorSlot:
    """A small tensor of a layer that a variant may bring its own values for, such as a norm's weight.

    The forward path reads `live` in place, under torch.compile too, so its address never changes.
    """

    live: Tensor
    base: Tensor = field(init=False)  # full precision: kept here, a few KB a layer

    def __post_init__(self) -> None:
        self.base = self.live.detach().clone()


class Part(NamedTuple):
    """Half a decoder layer in one format: it comes into memory, and leaves it, as one."""

    layer: int  # decoder layer id
    half: Half
    format: str  # of this half


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """A part that is in memory.

    Attributes:
        linears: name inside the layer |-> what the forward pass calls.
        tensors: name of a `TensorSlot` |-> the values that the part brings; the base's where it brings none.
        num_bytes: that it takes, in whole pages where memory goes by the page.
    """

    linears: Mapping[str, LinearImpl]
    tensors: Mapping[str, Tensor]
    num_bytes: int


class PartSource(Protocol):
    """Where parts come from, and where their memory goes."""

    def __contains__(self, part: Part) -> bool: ...

    def fetch(self, parts: Sequence[Part]) -> Future[Any]:
        """Begin to read what `load` needs for these parts, and wait for no disk."""
        ...

    def load(self, parts: Sequence[Part], fetched: Any = None) -> dict[Part, LoadedPart]:
        """Bring parts into memory, all or none; return when they can be called.

        Args:
            parts: halves of layers.
            fetched: what `fetch` has read for them; None = read it now.
        """
        ...

    def unload(self, parts: Sequence[Part]) -> None:
        """Give back the memory of parts that nobody refers to any more, once the work queued before is done."""
        ...


class LayerSwapper:
    """Brings the layers of the next level in beside the running ones, then flips them all at once.

    1. Between `prepare` and `commit` nothing that the forward path reads has changed.
    2. A `prepare` that raises leaves nothing staged, every slot as it was, and no memory taken.
    3. `commit` only stores attributes and copies small tensors.
    4. What a commit replaced keeps its memory until `reclaim`: steps under way may read it.

    One call at a time. `commit` belongs between two forward passes, on their thread; the others may run beside them.
    """

    def __init__(
        self,
        slots: Mapping[int, Mapping[str, LinearSlot]],
        live: Mapping[Part, LoadedPart],
        source: PartSource,
        tensors: Mapping[int, Mapping[str, TensorSlot]] = MappingProxyType({}),
        look: Look = lambda *_: None,
    ) -> None:
        """Start with the base in use.

        Args:
            slots: by decoder layer id and linear name.
            live: the parts that the slots have now: one for each half of each layer.
            source: holds every part that will be asked for.
            tensors: norms and the like that variants bring their own values for, by layer and name.
            look: at every part that is staged, before it may be put in use.
        """
        self._slots = slots
        self._live = {(part.layer, part.half): (part, loaded) for part, loaded in live.items()}
        self._source = source
        self._tensors = tensors
        self._look = look
        self._staged: dict[Part, LoadedPart] | None = None
        self._replaced: list[tuple[Part, LoadedPart]] = []

    @property
    def resident_bytes(self) -> int:
        """Bytes of the parts in use."""
        return sum(loaded.num_bytes for _, loaded in self._live.values())

    @property
    def staging_bytes(self) -> int:
        """Bytes in memory for parts that are not in use yet, or not any more."""
        staged = self._staged or {}
        return sum(loaded.num_bytes for loaded in (*staged.values(), *(loaded for _, loaded in self._replaced)))

    def formats(self) -> dict[int, str]:
        """Format in use, by layer id."""
        found = {}
        for layer in self._slots:
            halves = [self._live[layer, half][0].format for half in HALVES if (layer, half) in self._live]
            found[layer] = join_format(halves[0], halves[-1])
        return found

    def fetch(self, changes: Mapping[int, str]) -> Future[Any]:
        """Begin to read what `prepare` needs for these changes, and wait for no disk.

        Raises:
            SwapError: a layer or format is unknown.
        """
        return self._source.fetch(self._changes(changes))

    def prepare(self, changes: Mapping[int, str], fetched: Any = None) -> None:
        """Bring the given layers in their new formats. What already is in its format costs nothing.

        Args:
            changes: layer |-> format.
            fetched: what `fetch` has read for them; None = read it now.

        Raises:
            SwapError: something is prepared already, or a layer or format is unknown.
            StoreError, KernelError, BackingError, ...: whatever reading and building raise; nothing stays staged.
        """
        if self._staged is not None:
            raise SwapError(
                f"{len(self._staged)} parts of layers are prepared already, the limit is one change at a time; "
                "commit or abort it before the next prepare"
            )
        self.reclaim()
        parts = self._changes(changes)
        staged = self._source.load(parts, fetched)
        try:
            for part, loaded in staged.items():
                _, live = self._live[part.layer, part.half]
                self._look(part.layer, part.format, self._half(part, loaded), self._half(part, live))
        except BaseException:
            staged.clear()
            del loaded
            self._source.unload(parts)
            raise
        self._staged = staged

    def commit(self) -> None:
        """Put everything staged in use. What it replaces keeps its memory until `reclaim`.

        Raises:
            SwapError: nothing is prepared.
        """
        if self._staged is None:
            raise SwapError("nothing is prepared; call prepare before commit")
        staged, self._staged = self._staged, None
        for part, loaded in staged.items():
            for name, slot in self._tensors.get(part.layer, {}).items():
                if half_of(name) == part.half:
                    slot.live.copy_(loaded.tensors.get(name, slot.base))
            for name, linear in self._linears(part):
                linear.impl = loaded.linears[name]
                linear.format = part.format
            self._replaced.append(self._live[part.layer, part.half])
            self._live[part.layer, part.half] = part, loaded

    def reclaim(self) -> None:
        """Give the memory of what was replaced back, once no step under way reads it."""
        parts = [part for part, _ in self._replaced]
        self._replaced = []
        if parts:
            self._source.unload(parts)

    def abort(self) -> None:
        """Drop everything staged. Harmless when nothing is."""
        parts = list(self._staged or ())
        self._staged = None
        if parts:
            self._source.unload(parts)

    def _changes(self, changes: Mapping[int, str]) -> list[Part]:
        return [part for layer, fmt in changes.items() for part in self._changed(layer, fmt)]

    def _changed(self, layer: int, layer_format: str) -> list[Part]:
        """Return the halves of a layer that are not in their new format yet."""
        if layer not in self._slots:
            raise SwapError(f"layer {layer} is not morphable; morphable are {sorted(self._slots)}")
        wanted = (
            Part(layer, half, fmt)
            for half, fmt in zip(HALVES, split_format(layer_format), strict=True)
            if (layer, half) in self._live
        )
        parts = [part for part in wanted if self._live[layer, part.half][0] != part]
        for part in parts:
            if part not in self._source:
                raise SwapError(
                    f"layer {layer}: format {part.format!r} of its {part.half} was not made; add it to ladder.steps"
                )
        return parts

    def _half(self, part: Part, loaded: LoadedPart) -> HalfLayer:
        """Return half a layer with the norms that go with it."""
        slots = self._tensors.get(part.layer, {})
        return HalfLayer(loaded.linears, {name: loaded.tensors.get(name, slot.base) for name, slot in slots.items()})

    def _linears(self, part: Part) -> Iterable[tuple[str, LinearSlot]]:
        return ((name, slot) for name, slot in self._slots[part.layer].items() if half_of(name) == part.half)
