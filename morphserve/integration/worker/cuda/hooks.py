"""Where vLLM sizes, captures and warms up on a GPU, and what levels change about it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from morphserve.integration import seams
from morphserve.integration.start import check_fixed_kv
from morphserve.integration.worker.cuda.graphs import LevelGraphs
from morphserve.integration.worker.cuda.workspace import SharedWorkspace
from morphserve.integration.worker.state import rank


def install_cuda_seams(allocate_kv_cache: Callable[..., Any]) -> None:
    """Wrap both model runners of a GPU worker. Re-entrant.

    Args:
        allocate_kv_cache: the maker that the first runner's allocation is wrapped with; the second has its own name.
    """
    seams.wrap(seams.KV_ALLOC_V2, allocate_kv_cache)
    for capture in (seams.CAPTURE_V1, seams.CAPTURE_V2):
        seams.wrap(capture, _capture_model)
    for memory in (seams.GRAPH_MEMORY_V1, seams.GRAPH_MEMORY_V2):
        seams.wrap(memory, _graph_memory)
    seams.wrap(seams.WORKER_WARM, _warm_up)
    seams.wrap(seams.WORKER_MEMORY, _available_memory)


def _capture_model(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def capture_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        mine = rank()
        if mine.transition is None or kwargs.get("profile_only"):
            return original(self, *args, **kwargs)
        assert mine.layers is not None and mine.kv is not None
        manager = getattr(self, "cudagraph_manager", None)
        if manager is not None and manager.use_breakable_cg:
            manager.init_breakable_cg_runner(self.model)  # else it is made in mid-capture, and belongs to no graph set
        mine.graphs = LevelGraphs(self, mine.swapper, mine.transition, mine.layers.weights)
        workspace = SharedWorkspace()

        def capture() -> int:
            workspace.open()
            num_bytes = int(original(self, *args, **kwargs))
            workspace.check()
            return num_bytes

        return mine.graphs.capture(
            capture,
            mine.level_formats,
            mine.kv.num_mapped,
            kept=mine.graph_set_estimate,
            # How many sets there are beside levels follows from a rank's own memory, and ranks capture together.
            between=self.vllm_config.parallel_config.world_size_across_dp == 1,
        )

    return capture_model


def _graph_memory(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def profile_cudagraph_memory(self: Any) -> int:
        """Return what all levels' graphs take at most: vLLM captures one set to know, and levels share pieces."""
        mine, num_bytes = rank(), int(original(self))
        if mine.layers is None:
            return num_bytes
        mine.graph_set_bytes = mine.graph_set_estimate = num_bytes
        return num_bytes * mine.layers.num_graph_sets

    return profile_cudagraph_memory


def _available_memory(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def determine_available_memory(self: Any) -> int:
        mine, available = rank(), int(original(self))
        if mine.layers is not None:
            check_fixed_kv(self, mine.layers.num_graph_sets)
            if self.cache_config.kv_cache_memory_bytes:  # what graphs take has not come off that
                mine.graph_set_bytes = 0
        return available

    return determine_available_memory


def _warm_up(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        config, kv = getattr(self.model_runner, "kv_cache_config", None), rank().kv
        if kv is None or config is None:
            return original(self, *args, **kwargs)
        # Warm-up runs requests on the blocks that this number promises, and most of them have no pages yet.
        laid_out, config.num_blocks = config.num_blocks, kv.num_mapped
        try:
            done = original(self, *args, **kwargs)
        finally:
            config.num_blocks = laid_out
        kv.warm_up(self.model_runner)
        return done

    return compile_or_warm_up_model


def show_graphs() -> None:
    """Show the graphs of the formats that the layers have now. Between two steps, right after they have switched."""
    if (graphs := rank().graphs) is not None:
        graphs.show()
