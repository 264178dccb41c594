"""Switching decoder layers between formats on one rank: prepare may fail, commit cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from quant_layers.errors import StoreError, SwapError
from quant_layers.formats.halves import HALVES, Half, format_of, half_of, join_format, split_format
from quant_layers.kernels.cpu_linears import LinearImpl
from quant_layers.kernels.registry import Kernel
from quant_layers.memory import trim
from quant_layers.store.layer_store import BASE, VariantStore

BIAS = "bias"  # tensor name under which a variant stores a bias that is not the base's
RECIPE_MARK = "+"  # in a stored layer's kernel name: what comes after it says how the weights were prepared
BuildBase = Callable[[int, str, dict[str, Tensor]], LinearImpl]  # (layer, linear name, stored tensors)


@dataclass(slots=True, eq=False)
class LinearSlot:
    """One morphable linear. The forward path calls `slot.impl(x)`, looked up anew on each call."""

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


@dataclass(frozen=True, slots=True)
class _Staged:
    slot: LinearSlot
    impl: LinearImpl
    format: str


@dataclass(slots=True)
class _Change:
    """Everything that one `commit` puts in use."""

    linears: list[_Staged] = field(default_factory=list)
    tensors: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (live, new values)

    def clear(self) -> None:
        self.linears.clear()
        self.tensors.clear()


class LayerSwapper:
    """Builds the layers of the next level beside the running ones, then flips them all at once.

    1. Between `prepare` and `commit` nothing that the forward path reads has changed.
    2. A `prepare` that raises leaves nothing staged and every slot as it was.
    3. `commit` only stores attributes and copies small tensors. The replaced linears are dropped and their
       memory returned.

    One call at a time. `commit` belongs between two forward passes, on their thread; `prepare` touches
    nothing they read and may run beside them.
    """

    def __init__(
        self,
        slots: Mapping[int, Mapping[str, LinearSlot]],
        store: VariantStore,
        kernels: Mapping[str, Kernel],
        build_base: BuildBase,
        reclaim: Callable[[], None] = trim,
        tensors: Mapping[int, Mapping[str, TensorSlot]] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            slots: by decoder layer id and linear name.
            store: holds every format of `kernels`, and the base, for every layer that will be asked for.
            kernels: by format.
            build_base: makes a stored base linear callable again.
            reclaim: returns what was dropped to the system; malloc_trim walks the whole heap (5-46 ms in a
                server), so a caller whose allocator unmaps freed weights by itself passes something cheaper.
            tensors: by decoder layer id and name. A variant that stores none of that name gets the base's.
        """
        self._slots = slots
        self._store = store
        self._kernels = kernels
        self._build_base = build_base
        self._reclaim = reclaim
        self._tensors = tensors
        self._staged: _Change | None = None

    @property
    def resident_bytes(self) -> int:
        """Bytes of the linears in use, without staging."""
        return sum(slot.impl.nbytes for layer in self._slots.values() for slot in layer.values())

    @property
    def staging_bytes(self) -> int:
        """Bytes built but not yet in use."""
        return 0 if self._staged is None else sum(new.impl.nbytes for new in self._staged.linears)

    def formats(self) -> dict[int, str]:
        """Format in use, by layer id. All linears of a half change together."""
        found = {}
        for layer, linears in self._slots.items():
            by_half = {half_of(name): slot.format for name, slot in linears.items()}
            attention, mlp = (by_half.get(half, next(iter(by_half.values()))) for half in HALVES)
            found[layer] = join_format(attention, mlp)
        return found

    def prepare(self, changes: Mapping[int, str]) -> None:
        """Build the given layers in their new formats. Layers that already have it cost nothing.

        Raises:
            SwapError: something is prepared already, or the layer or format is unknown.
            StoreError, KernelError, ...: whatever reading and building raise; nothing stays staged.
        """
        if self._staged is not None:
            raise SwapError(
                f"{len(self._staged.linears)} linears are prepared already, the limit is one change at a time; "
                "commit or abort it before the next prepare"
            )
        for layer, format in changes.items():
            self._check(layer, format)
        staged = _Change()
        try:
            for layer, format in changes.items():
                self._build_layer(layer, format, staged)
        except BaseException:
            staged.clear()
            self._reclaim()
            raise
        self._staged = staged

    def commit(self) -> None:
        """Put everything staged in use and give the replaced linears' memory back.

        Raises:
            SwapError: nothing is prepared.
        """
        if self._staged is None:
            raise SwapError("nothing is prepared; call prepare before commit")
        staged, self._staged = self._staged, None
        for live, values in staged.tensors:
            live.copy_(values)
        for new in staged.linears:
            new.slot.impl = new.impl
            new.slot.format = new.format
        if staged.linears:
            self._reclaim()

    def abort(self) -> None:
        """Drop everything staged. Harmless when nothing is."""
        staged, self._staged = self._staged, None
        if staged is not None and staged.linears:
            staged.clear()
            self._reclaim()

    def _check(self, layer: int, format: str) -> None:
        if layer not in self._slots:
            raise SwapError(f"layer {layer} is not morphable; morphable are {sorted(self._slots)}")
        for part in split_format(format):
            if part != BASE and part not in self._kernels:
                known = [BASE, *sorted(self._kernels)]
                raise SwapError(f"layer {layer}: unknown format {part!r}; known are {known}")

    def _build_layer(self, layer: int, layer_format: str, staged: _Change) -> None:
        """Stage the halves that are not in their new format yet."""
        slots = self._slots[layer]
        changed = {half_of(name) for name, slot in slots.items() if slot.format != format_of(layer_format, name)}
        by_format: dict[str, set[Half]] = {}
        for half, format in zip(HALVES, split_format(layer_format), strict=True):
            if half in changed:
                by_format.setdefault(format, set()).add(half)
        for format, halves in by_format.items():
            self._build_halves(layer, format, halves, staged)

    def _build_halves(self, layer: int, format: str, halves: set[Half], staged: _Change) -> None:
        slots = {name: slot for name, slot in self._slots[layer].items() if half_of(name) in halves}
        row = self._store.entry(layer, format)
        kernel = None if format == BASE else self._kernels[format]
        if kernel is not None and row.kernel.partition(RECIPE_MARK)[0] != kernel.name:
            raise StoreError(
                f"layer {layer} {format!r} is packed for kernel {row.kernel!r}, here runs {kernel.name!r}; "
                f"delete {self._store.directory}, and the next start builds it again"
            )
        tensors = self._store.read(layer, format, lambda name: half_of(name) in halves)
        for name, slot in self._tensors.get(layer, {}).items():
            if half_of(name) in halves:
                brought = tensors.pop(name, None)
                staged.tensors.append((slot.live, slot.base if brought is None else brought["weight"]))
        if set(tensors) != set(slots):
            raise StoreError(
                f"layer {layer} {format!r} holds linears {sorted(tensors)}, the model has {sorted(slots)}; "
                f"delete {self._store.directory}, and the next start builds it again"
            )
        for name, linear in slots.items():
            parts = tensors.pop(name)  # so that a kernel which copies leaves no second copy behind
            if kernel is None:
                impl = self._build_base(layer, name, parts)
            else:
                impl = kernel.build(parts, parts.pop(BIAS, linear.bias))
            staged.linears.append(_Staged(linear, impl, format))
            del parts, impl
