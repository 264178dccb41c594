"""What vLLM keeps CUDA graphs in, and all dictionaries that may stand there: one for each combination of formats."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from morphserve.residence.errors import GraphSetError
from morphserve.residence.graphs.output_alias import OutputAlias

Formats = tuple[str, ...]  # by decoder layer, in the order of their ids
# Opened around a forward pass, it collects the places in Formats of the layers whose linears run.
Watch = Callable[[], AbstractContextManager[set[int]]]


@dataclass(frozen=True, slots=True, eq=False)
class Holder:
    """An object of vLLM's that keeps graphs and replays them.

    In vLLM 0.32: `graphs` of the V2 runner's CudaGraphManager (whole steps); `concrete_cudagraph_entries` of each
    CUDAGraphWrapper (pieces, and whole steps in the V1 runner); `entries` of a BreakableCUDAGraphWrapper (not full,
    though it depends on all layers).

    A holder that is not full and depends on given layers is a *piece*: it calls `runnable`, captures into
    `graph_pool`, and its entries have `cudagraph`, `output` and `input_addresses`, as a CUDAGraphWrapper's have.
    """

    owner: Any
    attribute: str  # of its dictionary: descriptor |-> graph, or an entry that has one
    scope: tuple[int, ...] | None = None  # places in Formats that its graphs depend on; None: all
    full: bool | None = None  # one graph is a whole step; None: if it depends on all layers
    learns: bool = False  # becomes a piece: its scope is what `runnable` uses while the first graph set is captured

    @property
    def is_full(self) -> bool:
        return self.scope is None if self.full is None else self.full

    @property
    def is_piece(self) -> bool:
        return self.scope is not None and not self.is_full

    def part(self, formats: Formats) -> Formats:
        """Return what of the formats its graphs depend on."""
        return formats if self.scope is None else tuple(formats[layer] for layer in self.scope)


class Entries(dict[Any, Any]):
    """Graphs of one holder at one combination of formats. Takes more only while they are captured."""

    __slots__ = ("is_open", "keys_at_close")

    def __init__(self) -> None:
        super().__init__()
        self.is_open = False
        self.keys_at_close: frozenset[Any] = frozenset()

    def __setitem__(self, key: Any, value: Any) -> None:
        if not self.is_open:
            raise GraphSetError(
                f"a CUDA graph of {key} was to be captured here, where {len(self)} graphs are all there will be. While "
                "serving: what chose it must choose from a narrowed table, add its Route. In a later set: capture no "
                "size that the first one lacks"
            )
        super().__setitem__(key, value)

    def close(self, known: dict[frozenset[Any], frozenset[Any]]) -> None:
        """Forget graphs whose capture did not end, and take no more.

        Args:
            known: sets of keys there have been. Equal sets become one object, which a switch compares at no cost.
        """
        for key in [key for key, entry in self.items() if _is_unfinished(entry)]:
            del self[key]
        self.is_open = False
        self.keys_at_close = known.setdefault(frozenset(self), frozenset(self))


def _is_unfinished(entry: Any) -> bool:
    """Return whether an entry of vLLM's wrappers has no graph yet. A bare graph always is one."""
    return getattr(entry, "cudagraph", entry) is None or getattr(entry, "capture", entry) is None


class Watched:
    """What a piece runs while the first graph set is captured: it tells which layers' linears the piece uses."""

    __slots__ = ("_runnable", "_watch", "seen")

    def __init__(self, runnable: Callable[..., Any], watch: Watch) -> None:
        self._runnable, self._watch = runnable, watch
        self.seen: set[int] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._watch() as used:
            output = self._runnable(*args, **kwargs)
        self.seen |= used
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runnable, name)  # vLLM's wrapper offers what its runnable has


@dataclass(slots=True, eq=False)
class GraphCache:
    """One holder and all its dictionaries."""

    given: Holder
    holder: Holder = field(init=False)  # with the scope it has learned
    by_formats: dict[Formats, Entries] = field(default_factory=dict)
    home: Entries | None = None  # of the first graph set
    opened: Entries | None = None  # while a graph set is captured
    stock: tuple[Any, Any] | None = None  # runnable and pool, while another stands in for them
    watched: Watched | None = None

    def __post_init__(self) -> None:
        self.holder = self.given

    @property
    def is_full(self) -> bool:
        """Whether its graphs are of whole steps."""
        return self.given.is_full

    def show(self, entries: Entries) -> None:
        setattr(self.holder.owner, self.holder.attribute, entries)

    def open(self, formats: Formats, pool: Any, watch: Watch | None) -> None:
        """Show the dictionary that takes graphs of these formats; what agrees with home is shown as it is.

        Args:
            formats: that the layers have.
            pool: for graphs of pieces that are not home's.
            watch: collects the layers that run; needed by holders that learn, for the first graph set.
        """
        entries = self.by_formats.setdefault(self.holder.part(formats), Entries())
        entries.is_open = True
        owner = self.holder.owner
        if self.home is None:
            self.home = entries
            if self.given.learns and watch is not None:
                self.stock = owner.runnable, owner.graph_pool
                owner.runnable = self.watched = Watched(owner.runnable, watch)
        elif self.holder.is_piece and entries is self.home:
            entries.is_open = False
        elif self.holder.is_piece:
            self.stock = owner.runnable, owner.graph_pool
            owner.runnable, owner.graph_pool = OutputAlias(owner.runnable, entries, self.home), pool
        self.opened = entries
        self.show(entries)

    def close(self, known: dict[frozenset[Any], frozenset[Any]]) -> int:
        """Return how many graphs were dropped because they read other addresses than home's."""
        if self.stock is not None:
            self.holder.owner.runnable, self.holder.owner.graph_pool = self.stock
            self.stock = None
        entries, self.opened = self.opened, None
        assert entries is not None and self.home is not None
        moved = []
        if self.holder.is_piece:
            moved = [key for key, entry in entries.items() if _reads_elsewhere(entry, self.home.get(key))]
        for key in moved:
            del entries[key]
        entries.close(known)
        return len(moved)

    def take_seen(self) -> frozenset[int]:
        """Return the layers that the piece was seen to use; asked once, after the first graph set."""
        watched, self.watched = self.watched, None
        return frozenset() if watched is None else frozenset(watched.seen)

    def limit(self, scope: frozenset[int], formats: Formats) -> None:
        """Let its graphs depend on these layers alone from now on; `formats`: of the one graph set there is."""
        self.holder = replace(self.given, scope=tuple(sorted(scope)))
        assert self.home is not None
        self.by_formats = {self.holder.part(formats): self.home}

    def clear(self, closed: Entries) -> None:
        """Forget all graphs, and what was learned with them."""
        self.by_formats.clear()
        self.home = self.watched = None
        self.holder = self.given
        self.show(closed)


def _reads_elsewhere(entry: Any, home: Any) -> bool:
    return entry.cudagraph is not None and (home is None or entry.input_addresses != home.input_addresses)
