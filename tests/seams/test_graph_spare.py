"""What vLLM keeps free of KV blocks for CUDA graphs, and what of it goes to level 0 once they have been captured."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kv_resize import ArenaBacking, ElasticCache, FakePageAllocator, KVGeometry, PagePool
from morphserve.config import parse_config
from morphserve.integration.describe import RankDescription
from morphserve.integration.engine import runtime as engine_runtime
from morphserve.integration.engine.runtime import EngineRuntime
from morphserve.integration.worker import state
from morphserve.integration.worker.cuda import hooks
from morphserve.integration.worker.cuda.graphs import LevelGraphs
from morphserve.integration.worker.kv import RankKV
from morphserve.integration.worker.worker import MorphServeWorker
from morphserve.residence.paged.residence import PagedResidence

pytestmark = pytest.mark.seams

MIB = 1 << 20
NUM_LAYERS, LAYER_BYTES, BLOCK_BYTES, GRANULARITY = 4, 1000, 100, 2


@pytest.mark.parametrize(
    ("captured", "unused"),
    [
        ([300, 480, 490], 760 + 760 - 480 - 490),
        ([760, 760, 760], 0),
        ([900, 480, 490], 550 - (900 - 760)),  # level 0's own took more than was kept for it
        ([300, 800, 900], 0),
        ([300], 0),  # a rank whose layers never change
    ],
)
def test_what_graphs_leave_is_of_levels_above_0(captured: list[int], unused: int) -> None:
    """Guards: memory that graphs take given to KV blocks; what stock vLLM leaves idle counted as ours."""
    graphs = object.__new__(LevelGraphs)
    graphs._set_bytes, graphs._between_bytes = captured, 0
    assert graphs.unused(760) == unused


@pytest.mark.parametrize(("fixed", "kept"), [(None, 300), (8 * MIB, 0)])
def test_only_what_vllm_has_taken_off_is_given_back(
    monkeypatch: pytest.MonkeyPatch, fixed: int | None, kept: int
) -> None:
    """Guards: KV blocks on memory that nobody has kept, where the KV size was given."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    layers: Any = SimpleNamespace(num_graph_sets=4)
    monkeypatch.setattr(state, "_rank", mine := state.Rank(layers=layers))
    runner = SimpleNamespace(profile_cudagraph_memory=lambda: hooks._graph_memory(lambda self: 100)(object()))
    worker = SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_memory_bytes=fixed), model_runner=runner, available_kv=7 * MIB
    )

    def determine(self: Any) -> int:
        return int(self.available_kv - self.model_runner.profile_cudagraph_memory())

    assert hooks._available_memory(determine)(worker) == 7 * MIB - 400
    assert MorphServeWorker().morphserve_kept_for_graphs() == kept
    assert MorphServeWorker().morphserve_unused_by_graphs() == 0, "nothing was captured, as without graphs"
    mine.graphs = object.__new__(LevelGraphs)
    mine.graphs._set_bytes, mine.graphs._between_bytes = [100, 40, 40, 40], 0
    assert MorphServeWorker().morphserve_unused_by_graphs() == (180 if kept else 0)


class Ranks:
    """Two ranks, the second with blocks of twice the size."""

    def __init__(self, unused: Sequence[int], backed: Sequence[int] | None = None) -> None:
        self.unused, self.backed = unused, backed
        self.asked: list[tuple[Any, ...]] = []
        layers = {fmt: (LAYER_BYTES // share,) * NUM_LAYERS for fmt, share in (("base", 1), ("w8", 2))}
        self.described = [RankDescription(rank, layers, 10, {"w8": "k"}, page_bytes=MIB) for rank in range(2)]

    def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> Sequence[Any]:
        if name == "morphserve_describe":
            return self.described
        self.asked.append((name, *args))
        if name == "morphserve_extend":
            return self.backed or [args[0]] * 2
        return {"morphserve_kept_for_graphs": [2000, 4000], "morphserve_unused_by_graphs": self.unused}.get(name, [])


class Cache:
    """vLLM's settings of the KV cache."""

    def __init__(self, num_gpu_blocks_override: int | None) -> None:
        self.num_gpu_blocks_override, self.block_size = num_gpu_blocks_override, 16


def planned(
    monkeypatch: pytest.MonkeyPatch, ranks: Ranks, kv: dict[str, Any], given: int | None, held: int = 20
) -> EngineRuntime:
    """An engine that has planned its KV cache: 20 blocks at level 0, 10 more where all layers have 8 bits.

    Its memory holds `held` blocks.
    """
    for name in ("check_supported", "check_kinds", "check_floor", "check_given_blocks"):
        monkeypatch.setattr(engine_runtime, name, lambda *args: None)
    monkeypatch.setattr(engine_runtime, "blocks_of_one_request", lambda *args: 1)
    monkeypatch.setattr(engine_runtime, "_granularity", lambda *args: GRANULARITY)
    cache = Cache(given)
    model = SimpleNamespace(get_total_num_hidden_layers=lambda: NUM_LAYERS, max_model_len=16)
    ladder = {"steps": [{"format": "w8", "layers_per_level": 2}]}
    of_engine = EngineRuntime(
        SimpleNamespace(model_executor=ranks),  # type: ignore[arg-type]
        SimpleNamespace(cache_config=cache, model_config=model, parallel_config=SimpleNamespace(data_parallel_index=0)),  # type: ignore[arg-type]
        parse_config({"kv": kv, "ladder": ladder}),
    )

    def configs(*args: Any) -> list[Any]:
        blocks = cache.num_gpu_blocks_override or held
        sizes = (BLOCK_BYTES * blocks, 2 * BLOCK_BYTES * blocks)
        return [SimpleNamespace(num_blocks=blocks, kv_cache_tensors=[SimpleNamespace(size=size)]) for size in sizes]

    laid_out = of_engine.plan_kv(configs, [], [0, 0])
    of_engine.laid_out = laid_out[0].num_blocks  # type: ignore[attr-defined]
    return of_engine


def blocks(of_engine: EngineRuntime) -> list[int]:
    return [level.num_kv_blocks for level in of_engine.ladder]


@pytest.mark.parametrize(
    ("unused", "backed", "found"),
    [
        ([1500, 3000], None, [34, 38, 44]),  # 15 blocks of either rank, in pairs
        ([1500, 700], None, [22, 26, 32]),  # the rank with the least decides
        ([9000, 9000], None, [40, 44, 50]),  # never more than the range was laid out for
        ([150, 150], None, [20, 24, 30]),
        ([1500, 3000], [34, 20], [20, 24, 30]),  # one device has no room after all
        ([1500, 3000], [34, 32], [32, 36, 42]),  # or for a granularity less
    ],
)
def test_every_level_has_what_all_ranks_can_back(
    monkeypatch: pytest.MonkeyPatch, unused: list[int], backed: list[int] | None, found: list[int]
) -> None:
    """Guards: blocks that one rank has no memory for, or half a page of; a range that is too short for them."""
    ranks = Ranks(unused, backed)
    of_engine = planned(monkeypatch, ranks, {}, None)
    assert blocks(of_engine) == [20, 24, 30] and of_engine.laid_out == 50  # type: ignore[attr-defined]
    of_engine.take_spare()
    assert blocks(of_engine) == found and of_engine.base_num_blocks == found[0]
    levels = [level.layer_formats for level in of_engine.ladder]
    assert ("morphserve_plan", 20, tuple(levels)) in ranks.asked, "graphs were captured at these"


@pytest.mark.parametrize(
    ("unused", "found"), [([100, 200], [22, 26, 32]), ([100, 199], [20, 24, 30]), ([0, 0], [20, 24, 30])]
)
def test_odd_blocks_and_odd_bytes_are_counted_together(
    monkeypatch: pytest.MonkeyPatch, unused: list[int], found: list[int]
) -> None:
    """Guards: a granularity lost to rounding twice, 128 blocks of 2,944 of an 8B in 22 GiB; blocks without memory."""
    of_engine = planned(monkeypatch, Ranks(unused), {}, None, held=21)
    assert blocks(of_engine)[0] == 20, "no odd block while nobody knows what graphs take"
    assert of_engine.laid_out == 50, "one block more and 20 kept for graphs are 20 in pairs"  # type: ignore[attr-defined]
    of_engine.take_spare()
    assert blocks(of_engine) == found


@pytest.mark.parametrize(
    ("kv", "given"), [({"base_num_blocks": 18}, None), ({"max_num_blocks": 30}, None), ({}, 20)]
)
def test_a_number_of_blocks_that_is_given_stays(
    monkeypatch: pytest.MonkeyPatch, kv: dict[str, int], given: int | None
) -> None:
    """Guards: more blocks than the user asked for."""
    ranks = Ranks([1500, 3000])
    of_engine = planned(monkeypatch, ranks, kv, given)
    before = blocks(of_engine)
    of_engine.take_spare()
    assert blocks(of_engine) == before and of_engine.laid_out == before[-1]  # type: ignore[attr-defined]
    assert [name for name, *_ in ranks.asked] == ["morphserve_plan"]


def test_new_blocks_are_backed_by_new_pages(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: pages of the reserve given to KV blocks, without which no level changes; a start that fails for want."""
    page = 4096
    allocator = FakePageAllocator(num_pages=16, granularity_bytes=page)
    pool = PagePool(allocator, 4 + 3)  # four for the first blocks, three in reserve
    geometry = KVGeometry.layer_outermost(2, page, 12, page)
    cache = ElasticCache(ArenaBacking(pool, geometry.size_bytes), geometry, 2)
    unused: Any = None
    residence = PagedResidence(
        torch.device("cpu"), allocator, pool, unused, unused, lambda: None, unused, 16 * page, unused
    )
    kv = object.__new__(RankKV)
    kv._cache, kv._extend = cache, residence.extend_cache
    assert kv.extend(5) == 5 and pool.num_free == 3
    assert kv.extend(12) == 5 and pool.num_free == 3 and "no more than 5 KV blocks" in caplog.text
    assert kv.extend(4) == 5, "another rank had no room for as many"


@pytest.mark.parametrize(
    ("num_ranks", "fixed", "between"), [(1, None, True), (1, 8 * MIB, True), (2, None, False)]
)
def test_ranks_capture_the_same_sets(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int, fixed: int | None, between: bool
) -> None:
    """Guards: a rank that waits for others in a capture which they have no memory for; a KV size that was given, and
    so nothing kept, taken for memory without end."""
    asked: list[dict[str, Any]] = []

    class Levels:
        def __init__(self, *args: Any) -> None: ...

        def capture(self, original: Any, levels: Any, num_kv_blocks: int, **how: Any) -> int:
            asked.append(how)
            return 0

    monkeypatch.setattr(hooks, "LevelGraphs", Levels)
    layers: Any = SimpleNamespace(weights={}, swapper=object(), num_graph_sets=4)
    mine = state.Rank(layers=layers, kv=SimpleNamespace(num_mapped=8), transition=object())  # type: ignore[arg-type]
    monkeypatch.setattr(state, "_rank", mine)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    parallel = SimpleNamespace(world_size_across_dp=num_ranks)
    profiled = SimpleNamespace(profile_cudagraph_memory=lambda: hooks._graph_memory(lambda self: 7)(object()))
    worker = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_memory_bytes=fixed), model_runner=profiled)
    hooks._available_memory(lambda self: self.model_runner.profile_cudagraph_memory())(worker)
    runner = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
    assert hooks._capture_model(lambda self: 0)(runner) == 0
    assert asked == [{"kept": 7, "between": between}]
