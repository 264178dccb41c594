"""CUDA graphs in miniature: objects that capture and keep graphs as vLLM's do, for a model that can be checked.

What a step computes names every layer's format, so a graph of other formats, or one that reads what nobody wrote,
gives another result.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cpu.graph_memory import Cell, Gpu, Graph

from morphserve.residence import Formats, GraphSets, Holder, Route, narrow_candidates

BASE = "base"
NUM_SCRATCH = {BASE: 0, "w8": 1, "w4": 2}  # kernels of other formats want other scratch memory
SIZES = (1, 2, 4)


class Mode(enum.Enum):
    NONE = 0
    PIECEWISE = 1
    FULL = 2


@dataclass(frozen=True)
class Desc:
    """As BatchExecutionDescriptor of the V2 runner."""

    cg_mode: Mode
    num_tokens: int
    num_active_loras: int = 0


@dataclass(frozen=True)
class Key:
    """As BatchDescriptor."""

    num_tokens: int
    num_active_loras: int = 0


@dataclass
class Entry:
    """As CUDAGraphEntry."""

    cudagraph: Graph | None = None
    output: tuple[Cell, ...] | None = None
    input_addresses: list[int] | None = None


class Wrapper:
    """As CUDAGraphWrapper around a piece: it captures whatever it is asked for and does not have."""

    def __init__(self, world: GraphWorld, runnable: Callable[..., tuple[Cell, ...]]) -> None:
        self.world, self.runnable = world, runnable
        self.graph_pool = world.gpu.home
        self.concrete_cudagraph_entries: dict[Key, Entry] = {}
        self.captured: Counter[int] = Counter()

    def __call__(self, *args: Cell) -> tuple[Cell, ...]:
        if self.world.mode is not Mode.PIECEWISE:
            return self.runnable(*args)
        key = Key(self.world.num_tokens)
        if key not in self.concrete_cudagraph_entries:
            self.concrete_cudagraph_entries[key] = Entry()
        entry = self.concrete_cudagraph_entries[key]
        if entry.cudagraph is not None:
            entry.cudagraph.replay()
            assert entry.output is not None
            return entry.output
        entry.input_addresses = [cell.data_ptr() for cell in args]
        with self.world.gpu.capture(self.graph_pool) as graph:
            output = self.runnable(*args)
        entry.output, entry.cudagraph = tuple(cell.weak() for cell in output), graph
        self.captured[key.num_tokens] += 1
        return output  # strong: until the forward pass is over, the allocator must not reuse it


class Manager:
    """As the V2 runner's CudaGraphManager."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.graphs: dict[Desc, Graph] = {}
        self._candidates: dict[tuple[int, int], list[Desc]] = {
            (n, 0): [Desc(mode, min(size for size in sizes if size >= n)) for mode in (Mode.FULL, Mode.PIECEWISE)]
            for n in range(max(sizes) + 1)
        }

    def dispatch(self, num_tokens: int) -> Desc:
        candidates = self._candidates.get((num_tokens, 0), [])
        return next((desc for desc in candidates if desc.num_tokens >= num_tokens), Desc(Mode.NONE, num_tokens))

    def run_fullgraph(self, desc: Desc) -> None:
        assert desc in self.graphs, f"No cudagraph for {desc}"
        self.graphs[desc].replay()


class GraphWorld:
    """A model of pieces between attentions, its graphs, and the graph sets under test."""

    def __init__(self, num_layers: int = 3, learns: bool = False, blind_to: int = -1) -> None:
        """
        Args:
            learns: nobody tells the graph sets which layers a piece depends on.
            blind_to: a layer whose linears run unseen.
        """
        self.gpu = Gpu()
        self.num_layers = num_layers
        self.formats: Formats = (BASE,) * num_layers  # what the layers have now
        self.mode, self.num_tokens = Mode.NONE, 0  # of the forward pass under way, padded
        self.ids, self.hidden = self.gpu.empty(), self.gpu.empty()  # buffers that stay
        pieces = range(num_layers + 1)
        self.wrappers = [
            self._wrap(lambda *args, piece=piece: self._piece(piece, *args), piece == num_layers) for piece in pieces
        ]
        self.manager = self._make_manager()
        self.holders = [Holder(self.manager, "graphs")] + [
            Holder(wrapper, "concrete_cudagraph_entries", full=False, learns=True)
            if learns
            else Holder(wrapper, "concrete_cudagraph_entries", scope_of(piece, num_layers))
            for piece, wrapper in enumerate(self.wrappers)
        ]
        self.routes = [Route(self.manager, "_candidates", narrow_candidates)]
        self._blind_to, self._used = blind_to, set[int]()
        self.graph_sets = GraphSets(self.holders, self.routes, later_pool=self.gpu.later, watch=self._watch)
        self._num_steps = 0

    def _wrap(self, runnable: Callable[..., tuple[Cell, ...]], is_last: bool) -> Any:
        return Wrapper(self, runnable)

    def _make_manager(self) -> Any:
        return Manager(SIZES)

    def _dispatch(self, num_tokens: int) -> Any:
        return self.manager.dispatch(num_tokens)

    def _full_desc(self, size: int) -> Any:
        return Desc(Mode.FULL, size)

    def capture(self, formats: Formats, full: Sequence[int] = SIZES, piecewise: Sequence[int] = SIZES) -> bool:
        """Layers get these formats, and graphs of these sizes, the largest first."""
        self.formats = formats
        self.graph_sets.begin(formats)
        try:
            self.capture_sizes(full, piecewise)
        finally:
            found = self.graph_sets.end()
        return found

    def capture_sizes(self, full: Sequence[int] = SIZES, piecewise: Sequence[int] = SIZES) -> None:
        """What vLLM does, which knows of no graph sets."""
        self.gpu.may_capture = True
        try:
            for size in sorted(piecewise, reverse=True):
                self.forward()
                self.forward(Mode.PIECEWISE, size)
            for size in sorted(full, reverse=True):
                self.forward()
                assert self._full_desc(size) not in self.manager.graphs
                with self.gpu.capture(self.gpu.home) as graph:
                    self.forward()
                self.manager.graphs[self._full_desc(size)] = graph
        finally:
            self.gpu.may_capture = False

    def switch(self, formats: Formats) -> bool:
        self.formats = formats
        return self.graph_sets.switch(formats)

    def step(self, num_tokens: int) -> Mode:
        """One step. What it gives must be what the layers' present formats give."""
        return self.run(self._dispatch(num_tokens))

    def run(self, desc: Any) -> Mode:
        """As `step`, with what was dispatched."""
        self._num_steps += 1
        self.gpu.memory[self.ids.address] = self._num_steps
        mode = Mode[desc.cg_mode.name]
        if mode is Mode.FULL:
            self.manager.run_fullgraph(desc)
        else:
            self.forward(mode, desc.num_tokens)
        found = self.gpu.memory[self.hidden.address]
        assert found == self._expected(), f"{desc} computed something else than {self.formats}"
        return mode

    def forward(self, mode: Mode = Mode.NONE, num_tokens: int = 0) -> None:
        self.mode, self.num_tokens = mode, num_tokens
        query, residual, attended = self.wrappers[0](self.ids)
        self._attention(query, attended)
        for wrapper in self.wrappers[1:-1]:
            query, residual, attended = wrapper(attended, residual)
            self._attention(query, attended)
        (hidden,) = self.wrappers[-1](attended, residual)
        self.hidden.copy_(hidden)

    def num_captured(self) -> int:
        """Graphs of pieces that were ever captured."""
        return sum(wrapper.captured.total() for wrapper in self.wrappers)

    def _attention(self, query: Cell, attended: Cell) -> None:
        self.gpu.launch(attended.address, lambda value: hash(("attention", value)), query)

    def _piece(self, piece: int, *args: Cell) -> tuple[Cell, ...]:
        if piece == 0:
            residual = self.gpu.compute("embedding", *args)
        else:
            attended, before = args
            residual = self.gpu.compute("add", self._linear(piece - 1, "mlp", attended), before)
        if piece == self.num_layers:
            return (residual,)
        return self._linear(piece, "qkv", residual), residual, self.gpu.empty()

    @contextmanager
    def _watch(self) -> Iterator[set[int]]:
        self._used = set()
        yield self._used
        self._used = set()

    def _linear(self, layer: int, name: str, x: Cell) -> Cell:
        """Scratch memory is written before the input is read: lying over the input, it would destroy it."""
        self._used |= {layer} - {self._blind_to}
        scratch = [self.gpu.compute("scratch", x) for _ in range(NUM_SCRATCH[self.formats[layer]])]
        out = self.gpu.compute(f"{name} {layer} {self.formats[layer]}", x)
        del scratch
        return out

    def _expected(self) -> int:
        residual = hash(("embedding", self._num_steps))
        for layer, format in enumerate(self.formats):
            attended = hash(("attention", hash((f"qkv {layer} {format}", residual))))
            residual = hash(("add", hash((f"mlp {layer} {format}", attended)), residual))
        return residual


def scope_of(piece: int, num_layers: int) -> tuple[int, ...]:
    """Layers between attention `piece - 1` and attention `piece`."""
    return tuple(layer for layer in (piece - 1, piece) if 0 <= layer < num_layers)


def at(formats: Formats, **changes: str) -> Formats:
    """`at(formats, l0="w4")`: with other formats of some layers."""
    return tuple(changes.get(f"l{layer}", format) for layer, format in enumerate(formats))
