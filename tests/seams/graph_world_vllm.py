"""The graph miniature with vLLM's own objects in it: wrappers that capture, tables that choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cpu.graph_memory import Cell, Graph
from cpu.graph_world import SIZES, GraphWorld, Mode
from vllm.compilation import cuda_graph
from vllm.compilation.counter import compilation_counter
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, override_forward_context
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

MOST_REQUESTS: int | None = None  # None: of the largest size


class DeviceGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    graph: Graph

    def replay(self) -> None:
        self.graph.replay()


def context(mode: str, num_tokens: int) -> Any:
    forward = SimpleNamespace(
        batch_descriptor=BatchDescriptor(num_tokens), cudagraph_runtime_mode=CUDAGraphMode[mode], additional_kwargs={}
    )
    return override_forward_context(forward)  # type: ignore[arg-type]


def config(**changes: Any) -> Any:
    """What the objects under test read of a VllmConfig."""
    compilation = SimpleNamespace(
        cudagraph_capture_sizes=list(SIZES), max_cudagraph_capture_size=max(SIZES), compile_sizes=None
    )
    return SimpleNamespace(
        compilation_config=compilation,
        scheduler_config=SimpleNamespace(max_num_seqs=max(SIZES)),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        lora_config=None,
        speculative_config=None,
        **changes,
    )


class VllmWorld(GraphWorld):
    """The miniature with vLLM's own CUDAGraphWrapper around each piece, and its CudaGraphManager."""

    def _wrap(self, runnable: Callable[..., tuple[Cell, ...]], is_last: bool) -> Any:
        options = cuda_graph.CUDAGraphOptions(weak_ref_output=is_last)  # as vllm/compilation/backends.py has it
        return cuda_graph.CUDAGraphWrapper(runnable, config(), CUDAGraphMode.PIECEWISE, options)

    def _make_manager(self) -> Any:
        manager = object.__new__(CudaGraphManager)  # its __init__ wants process groups
        manager.vllm_config = config()
        manager.compilation_config = manager.vllm_config.compilation_config
        manager.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        manager.max_num_reqs, manager.decode_query_len, manager.varlen_decode = MOST_REQUESTS or max(SIZES), 1, False
        manager.ubatch_runner = None
        manager.lora_capture_cases, manager._lora_dispatch_map, manager._max_lora_case = [0], {}, 0
        manager.graphs, manager._candidates, manager._capture_descs = {}, {}, {}
        manager._init_candidates()
        manager._graphs_captured = True
        return manager

    def _dispatch(self, num_tokens: int) -> Any:
        return self.manager.dispatch(num_tokens, num_tokens, 1, 0)

    def _full_desc(self, size: int) -> Any:
        (desc,) = (desc for desc in self.manager._capture_descs[CUDAGraphMode.FULL] if desc.num_tokens == size)
        return desc

    def forward(self, mode: Mode = Mode.NONE, num_tokens: int = 0) -> None:
        with context(mode.name, num_tokens):
            super().forward(mode, num_tokens)

    def num_captured(self) -> int:
        return compilation_counter.num_cudagraph_captured


def open_world(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], VllmWorld] = VllmWorld
) -> VllmWorld:
    """With torch's capture replaced by the miniature's."""
    pools = SimpleNamespace(home=None)
    monkeypatch.setattr(cuda_graph, "current_platform", SimpleNamespace(get_global_graph_pool=lambda: pools.home))
    monkeypatch.setattr(cuda_graph, "current_stream", lambda: None)
    monkeypatch.setattr(cuda_graph, "capture_pool", lambda pool, vllm_config: nullcontext(pool))
    monkeypatch.setattr(cuda_graph, "weak_ref_tensors", lambda cells: tuple(cell.weak() for cell in cells))
    monkeypatch.setattr(compilation_counter, "num_cudagraph_captured", 0)
    world = make()
    for wrapper in world.wrappers:
        wrapper.graph_pool = world.gpu.home

    @contextmanager
    def capture(graph: DeviceGraph, pool: Any, stream: Any) -> Iterator[None]:
        with world.gpu.capture(pool) as graph.graph:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", DeviceGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return world
