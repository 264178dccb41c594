"""A device in miniature: memory with addresses, and graphs that replay kernels on the addresses of their capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Kernel = Callable[[dict[int, Any]], None]


class Pool:
    """Hands freed addresses out again, the latest first, as a caching allocator does."""

    def __init__(self, start: int) -> None:
        self._next, self._free = start, list[int]()

    def take(self) -> int:
        if self._free:
            return self._free.pop()
        self._next += 1
        return self._next

    def give(self, address: int) -> None:
        self._free.append(address)


class Cell:
    """A tensor of one value. When nobody holds the one that owns its address, the address is free again."""

    shape = (1,)

    def __init__(self, gpu: Gpu, address: int, pool: Pool | None) -> None:
        self.gpu, self.address, self._pool = gpu, address, pool

    def __del__(self) -> None:
        if self._pool is not None:
            self._pool.give(self.address)

    def data_ptr(self) -> int:
        return self.address

    def weak(self) -> Cell:
        return Cell(self.gpu, self.address, None)

    def copy_(self, other: Cell) -> None:
        self.gpu.launch(self.address, lambda value: value, other)


class Graph:
    """Kernels on the addresses of their capture."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.kernels = gpu, list[Kernel]()

    def replay(self) -> None:
        for kernel in self.kernels:
            kernel(self.gpu.memory)


class Gpu:
    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.eager = Pool(0)
        self.home, self.later = Pool(1000), Pool(2000)
        self.may_capture = False
        self._graph: Graph | None = None
        self._pool = self.eager

    def empty(self) -> Cell:
        return Cell(self, self._pool.take(), self._pool)

    def launch(self, to: int, function: Callable[..., Any], *inputs: Cell) -> None:
        """Run now, or record while a graph is captured."""
        addresses = [cell.address for cell in inputs]

        def kernel(memory: dict[int, Any]) -> None:
            memory[to] = function(*(memory.get(address, "never written") for address in addresses))

        if self._graph is None:
            kernel(self.memory)
        else:
            self._graph.kernels.append(kernel)

    def compute(self, name: str, *inputs: Cell) -> Cell:
        out = self.empty()
        self.launch(out.address, lambda *values: hash((name, *values)), *inputs)
        return out

    @contextmanager
    def capture(self, pool: Pool) -> Iterator[Graph]:
        assert self.may_capture, "a graph is captured while serving"
        assert self._graph is None, "captures do not nest"
        self._graph, self._pool = Graph(self), pool
        try:
            yield self._graph
        finally:
            self._graph, self._pool = None, self.eager
