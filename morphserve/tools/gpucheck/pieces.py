"""Pieces of a model, each with a graph of its own, whose levels share them: part of T7.

vLLM's CUDAGraphWrapper in miniature, on the device's own graphs. The banks, the watch and the landing are the real
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from morphserve.residence import Formats, GraphBanks, Holder, addresses_used
from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.device import Work, graph_pool, random_weight, synchronize

Outputs = tuple[Tensor, ...]
BASE, QUANTIZED = "base", "w4"


@dataclass(slots=True)
class _Entry:
    cudagraph: Work | None = None
    output: Outputs = ()
    input_addresses: tuple[int, ...] = ()


class _Piece:
    """Runs, captures or replays what lies between two attentions."""

    def __init__(self, model: PieceModel, runnable: Callable[..., Outputs]) -> None:
        self._model, self.runnable = model, runnable
        self.graph_pool = model.pool
        self.entries: dict[str, _Entry] = {}

    def __call__(self, *args: Tensor) -> Outputs:
        if not self._model.with_graphs:
            return self.runnable(*args)
        if "step" not in self.entries:
            self.entries["step"] = _Entry()
        entry = self.entries["step"]
        if entry.cudagraph is None:
            return self._capture(entry, args)
        entry.cudagraph()
        return entry.output

    def _capture(self, entry: _Entry, args: Outputs) -> Outputs:
        entry.input_addresses = tuple(arg.data_ptr() for arg in args)
        if self._model.bench.device != "cuda":
            entry.output = self.runnable(*args)
            entry.cudagraph = self._model.in_place_of_graph(self.runnable, args, entry.output)
            return entry.output
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.graph_pool):
            output = self.runnable(*args)
        # Like vLLM, keep addresses and no memory: what lies between pieces is the pool's again, and later captures in
        # the same pool write over it.
        entry.output = tuple(_weak(tensor) for tensor in output)
        entry.cudagraph = graph.replay
        return output


class PieceModel:
    """Layers of two linears with something eager between them, cut where vLLM cuts: between two attentions."""

    def __init__(self, bench: Bench, weights: list[dict[str, Tensor]], switch: Callable[[Formats], None]) -> None:
        """
        Args:
            bench: says where.
            weights: by layer: "up" [I, H] and "down" [H, I], found by `linear_of`.
            switch: gives the layers these formats.
        """
        self.bench, self._weights, self._switch = bench, weights, switch
        self._formats: Formats = ()
        self.with_graphs = False
        self.pool = graph_pool(bench.device)
        hidden = weights[0]["up"].shape[1]
        self.x = random_weight(16, hidden, bench.device, seed=5) * hidden**0.5
        self.out = torch.zeros_like(self.x)
        self.pieces = [_Piece(self, self._runnable(number)) for number in range(len(weights) + 1)]

    def _runnable(self, number: int) -> Callable[..., Outputs]:
        linear_of = torch.ops.morphserve.linear_of

        def run(*args: Tensor) -> Outputs:
            down = linear_of(args[0], self._weights[number - 1]["down"]) if number else 0
            residual = args[-1] + down
            if number == len(self._weights):
                return (residual,)
            return linear_of(residual, self._weights[number]["up"]), residual

        return run

    def switch(self, formats: Formats) -> None:
        """Of the layers; graphs stay as they are."""
        self._switch(formats)
        self._formats = formats

    def in_place_of_graph(self, runnable: Callable[..., Outputs], args: Outputs, output: Outputs) -> Work:
        """Runs at the formats of now, reads and writes the addresses of now, whatever the formats are then."""
        captured_at = self._formats

        def replay() -> None:
            now = self._formats
            self.switch(captured_at)
            for old, new in zip(output, runnable(*args), strict=True):
                old.copy_(new)
            self.switch(now)

        return replay

    def step(self) -> Tensor:
        """[B, H], a copy."""
        inner, residual = self.pieces[0](self.x)
        for piece in self.pieces[1:-1]:
            inner, residual = piece(self._attention(inner), residual)
        (hidden,) = self.pieces[-1](self._attention(inner), residual)
        self.out.copy_(hidden)
        synchronize(self.bench.device)
        return self.out.clone()

    def _attention(self, inner: Tensor) -> Tensor:
        """In place, as attention writes to a tensor that the piece before it has made."""
        return inner.copy_(F.silu(inner))


def check_pieces(
    bench: Bench, weights: list[dict[str, Tensor]], layer_of: dict[int, int], switch: Callable[[Formats], None]
) -> None:
    """Capture three levels, then replay them and what lies between them.

    Args:
        bench: for findings.
        weights: see `PieceModel`.
        layer_of: address of a weight |-> its layer.
        switch: gives the layers these formats.
    """
    model = PieceModel(bench, weights, switch)
    num_layers = len(weights)

    @contextmanager
    def watch() -> Iterator[set[int]]:
        found: set[int] = set()
        with addresses_used() as used:
            yield found
        found.update(layer_of[address] for address in used)

    holders = [Holder(piece, "entries", full=False, learns=True) for piece in model.pieces]
    banks = GraphBanks(holders, later_pool=graph_pool(bench.device) or "later", watch=watch)

    def at(*quantized: int) -> Formats:
        return tuple(QUANTIZED if layer in quantized else BASE for layer in range(num_layers))

    half = tuple(range(num_layers // 2))
    levels = [at(), at(*half), at(*range(num_layers)), at(num_layers - 1)]
    mixed = [at(*half, num_layers - 1)] if num_layers // 2 < num_layers - 1 else []  # pieces of two levels
    expected: dict[Formats, Tensor] = {}
    for formats in (*levels, *mixed):
        model.switch(formats)
        expected[formats] = model.step()
    for formats in levels:
        model.switch(formats)
        model.step()  # what is compiled or chosen at first use must not be captured
        banks.begin(formats)
        model.with_graphs = True
        try:
            model.step()
        finally:
            model.with_graphs = False
            banks.end()
    counts = list(banks.num_graphs().values())
    bench.require("later levels capture fewer pieces", max(counts[1:]) <= counts[0] > min(counts[1:]), f"{counts}")
    model.with_graphs = True
    wrong, lacking = [], set()
    order = [*levels, *mixed, *reversed(levels)] * bench.pick(10, 1)
    for turn, formats in enumerate(order):
        model.switch(formats)
        banks.switch(formats)
        lacking |= {(formats, number) for number, piece in enumerate(model.pieces) if not piece.entries}
        if lacking:
            break
        model.out.zero_()
        if not torch.equal(model.step(), expected[formats]):
            wrong.append(f"turn {turn}: {formats}")
    bench.require("every piece has a graph at every level", not lacking, f"{sorted(lacking)[:3]}")
    bench.require("pieces of several levels in one step give what the layers give", not wrong, "; ".join(wrong[:3]))
    bench.require("nothing was captured while serving", list(banks.num_graphs().values()) == counts)


class _AtAddress:
    """Device memory that others own."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None
        }  # fmt: skip


def _weak(tensor: Tensor) -> Tensor:
    """The same bytes; keeps nothing alive."""
    memory: Any = _AtAddress(tensor.data_ptr(), tensor.nbytes)
    return torch.as_tensor(memory, device=tensor.device).view(tensor.dtype).view(tensor.shape)
