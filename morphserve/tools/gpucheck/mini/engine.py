"""The small decoder with levels: its rank moves layers and KV blocks, and each level has its set of CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from torch import Tensor

from morphserve.residence import GraphSets, Holder, addresses_used
from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.device import Work, capture, graph_pool, synchronize
from morphserve.tools.gpucheck.mini.model import MiniModel, Shape
from morphserve.tools.gpucheck.mini.rank import MiniRank, Times
from quant_layers import BASE, Kernel, KernelError, choose

Generated = tuple[Tensor, Tensor]  # tokens [steps, batch]; hidden states [batch, hidden] of the last step
Graphs = Literal["full", "piecewise", "none"]  # one of a whole step, one of each piece, or none: vLLM's modes


class MiniEngine:
    """Level k runs the first `k * layers_per_level` layers quantized.

    Everything happens in the thread that decodes, but for what the rank's own thread does beside it.
    """

    def __init__(self, bench: Bench, shape: Shape, num_levels: int, layers_per_level: int) -> None:
        self.shape, self.num_levels, self.layers_per_level = shape, num_levels, layers_per_level
        self._device = bench.device
        self.batches = bench.pick((1, 2, 4, 8, 16), (1, 4))
        self.kernel = choose_kernel(bench)
        self.rank = MiniRank(bench.device, shape, self.kernel, num_levels * layers_per_level, layers_per_level)
        self.num_pages = self.rank.num_pages()
        self.level = 0
        self._graph_pool = graph_pool(bench.device)
        self.model = MiniModel(shape, self.rank.weights, self.rank.cache, bench.device, self._graph_pool)
        self.graphs: dict[int, Work] = {}  # of whole steps, by batch: those of the formats that layers have now
        holders = [Holder(piece, "entries", full=False, learns=True) for piece in self.model.pieces]
        later_pool = graph_pool(bench.device) or "later"
        self.graph_sets = GraphSets([Holder(self, "graphs"), *holders], later_pool=later_pool, watch=self._watch)

    @contextmanager
    def _watch(self) -> Iterator[set[int]]:
        found: set[int] = set()
        with addresses_used() as used:
            yield found
        found.update(self.rank.layer_of[address] for address in used)

    # -- decoding -----------------------------------------------------------------------------------------------------

    def capture_set(self) -> float:
        """Capture the graphs of the present formats; seconds."""
        start = time.perf_counter()
        self.model.reset()
        self.model.step(self.shape.batch)  # what is compiled or chosen at first use must not be captured
        synchronize(self._device)
        self.graph_sets.begin(self.rank.formats())
        try:
            self.decode(graphs="piecewise")
            for batch in sorted(self.batches, reverse=True):  # the largest first: the others fit into its memory
                self.model.reset()
                self.graphs[batch] = capture(self._device, self._step_of(batch), self._graph_pool)
            synchronize(self._device)
        finally:
            self.graph_sets.end()
        return time.perf_counter() - start

    def _step_of(self, batch: int) -> Work:
        return lambda: self.model.step(batch)

    def decode(self, batch: int | None = None, graphs: Graphs = "full") -> None:
        """Queue one step."""
        batch = batch or self.shape.batch
        if graphs == "full":
            self.graphs[batch]()
            return
        for piece in self.model.pieces:
            piece.with_graphs = graphs == "piecewise"
        try:
            self.model.step(batch)
        finally:
            for piece in self.model.pieces:
                piece.with_graphs = False

    def generate(self, num_steps: int, first_block: int = 0, graphs: Graphs = "full") -> Generated:
        """Return what so many steps give, from a fresh start."""
        self.model.reset(first_block)
        tokens = []
        for _ in range(num_steps):
            self.decode(graphs=graphs)
            tokens.append(self.model.tokens.clone())
        synchronize(self._device)
        return torch.stack(tokens), self.model.hidden.clone()

    # -- levels -------------------------------------------------------------------------------------------------------

    def move(self, target: int, beside: Callable[[], object] | None = None) -> list[Times]:
        """Go to a level, one after the other; `beside` is called while the rank works. What each took."""
        found = []
        while self.level != target:
            level = self.level + (1 if target > self.level else -1)
            low, high = sorted((self.level * self.layers_per_level, level * self.layers_per_level))
            fmt = self.kernel.format if level > self.level else BASE
            num_blocks = self.rank.num_blocks_with(level * self.layers_per_level)
            found.append(self.rank.change(dict.fromkeys(range(low, high), fmt), num_blocks, self._show, beside))
            self.level = level
        return found

    def switch(self, formats: Sequence[str]) -> None:
        """Give the layers these formats, one after the other, and the KV cache none of their pages."""
        now = self.rank.formats()
        for layer, fmt in enumerate(formats):
            if fmt != now[layer]:
                self.rank.change({layer: fmt}, self.rank.cache.num_mapped, self._show)

    def _show(self) -> None:
        self.graph_sets.switch(self.rank.formats())

    def close(self) -> None:
        """Give the device's memory back; the engine is of no use afterwards."""
        self.graph_sets.clear()
        synchronize(self._device)
        self.rank.close()


def same(one: Generated, other: Generated) -> bool:
    """Bit by bit."""
    return all(map(torch.equal, one, other))


def choose_kernel(bench: Bench) -> Kernel:
    """Return 4 bits where Triton runs; in a dry run fp8, which needs no interpreter."""
    if not bench.dry:
        with suppress(KernelError):
            return choose("w4", name="w4a16_triton", device=bench.device)
    return choose("fp8", name="fp8a16", device=bench.device)
