"""What lies between two attentions, with graphs of its own: vLLM's CUDAGraphWrapper in miniature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from morphserve.tools.gpucheck.device import Work, replay_without_graph

Outputs = tuple[Tensor, ...]


@dataclass(slots=True)
class Entry:
    """As `GraphSets` wants the entries of a piece."""

    cudagraph: Work | None = None
    output: Outputs = ()
    input_addresses: tuple[int, ...] = ()


class Piece:
    """Runs or, `with_graphs`, captures what has no graph yet and replays what has one."""

    def __init__(self, runnable: Callable[..., Outputs], device: str, pool: Any) -> None:
        """
        Args:
            runnable: takes and gives tensors [batch, ...].
            device: on "cpu" it runs again where a graph would be replayed.
            pool: that graphs take their memory from.
        """
        self.runnable, self.graph_pool, self._device = runnable, pool, device
        self.with_graphs = False
        self.entries: dict[int, Entry] = {}  # by batch

    def __call__(self, *args: Tensor) -> Outputs:
        if not self.with_graphs:
            return self.runnable(*args)
        batch = len(args[0])
        if batch not in self.entries:
            self.entries[batch] = Entry()
        entry = self.entries[batch]
        if entry.cudagraph is None:
            entry.input_addresses = tuple(arg.data_ptr() for arg in args)
            return self._capture(entry, args) if self._device == "cuda" else self._run_in_place(entry, args)
        entry.cudagraph()
        return entry.output

    def _capture(self, entry: Entry, args: Outputs) -> Outputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.graph_pool):
            output = self.runnable(*args)
        # Like vLLM, keep addresses and no memory: what lies between pieces is the pool's again, and later captures in
        # the same pool write over it.
        entry.output = tuple(_weak(tensor) for tensor in output)
        entry.cudagraph = graph.replay
        return output

    def _run_in_place(self, entry: Entry, args: Outputs) -> Outputs:
        """Capture what reads and writes the addresses of now whenever it is replayed, as a graph does."""
        runnable, output = self.runnable, self.runnable(*args)

        def work() -> None:
            entry.cudagraph = None  # so that what stands in for the piece does now what it did at the capture
            for old, new in zip(output, runnable(*args), strict=True):
                old.copy_(new)
            entry.cudagraph = replay

        replay = replay_without_graph(work)
        entry.output, entry.cudagraph = output, replay
        return output


class _AtAddress:
    """Device memory that others own."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None
        }  # fmt: skip


def _weak(tensor: Tensor) -> Tensor:
    """Return a tensor of the same bytes that keeps nothing alive."""
    memory: Any = _AtAddress(tensor.data_ptr(), tensor.nbytes)
    return torch.as_tensor(memory, device=tensor.device).view(tensor.dtype).view(tensor.shape)
