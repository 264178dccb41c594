"""What the worker of a device adds to vLLM's own: refusals while it runs, room for graphs, a workspace that stays."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from morphserve.config import MorphServeConfig
from morphserve.errors import ConfigError
from morphserve.integration import seams
from morphserve.integration.offline import logit_meter
from morphserve.integration.start import device_budget as budget
from morphserve.integration.worker.cuda.workspace import SharedWorkspace
from morphserve.integration.worker.refusals import _TARGETS, keeps_weights, refuse_weight_access

pytestmark = pytest.mark.seams

GIB = 1 << 30
# What vLLM's worker does to weights within a transfer alone, which is refused at the start.
_ONLY_IN_A_TRANSFER = {
    "init_weight_transfer_engine", "shutdown_weight_transfer_engine", "supports_draft_weight_updates",
    "start_draft_weight_update", "finish_weight_update",
}  # fmt: skip


@pytest.fixture
def restored_seams() -> Iterator[None]:
    """What a test wraps is put back."""
    before = seams.patches()
    yield
    for patch in reversed(seams.patches()):
        if patch not in before:
            patch.undo()


@pytest.mark.parametrize("method", _TARGETS)
def test_weights_are_left_alone_while_layers_come_and_go(
    monkeypatch: pytest.MonkeyPatch, restored_seams: None, method: str
) -> None:
    """Guards: parameters without pages that are written to or read, which ends the process, or on a CPU new weights
    that a restore undoes; and an engine without MorphServe in the same process that can no longer do so."""
    from vllm.v1.worker.gpu_worker import Worker

    called: list[str] = []
    monkeypatch.setattr(Worker, method, lambda self, *args, **kwargs: called.append(method))
    ours = False

    def is_ours() -> bool:
        return ours

    refuse_weight_access(is_ours)
    refuse_weight_access(is_ours)
    worker = object.__new__(Worker)
    getattr(worker, method)()
    assert called == [method]
    ours = True
    with pytest.raises(ConfigError, match=f"{method}: .* swapped out .* Restart the server"):
        getattr(worker, method)()
    assert called == [method]


def test_every_way_to_the_weights_is_known() -> None:
    """Guards: a method of vLLM's worker that takes or gives weights and is in no list, a new one or one left out."""
    from vllm.v1.worker.gpu_worker import Worker

    ways = {name for name in dir(Worker) if ("weight" in name or name.startswith("save_")) and not name.startswith("_")}
    assert ways - _ONLY_IN_A_TRANSFER == set(_TARGETS)


def test_the_worker_of_every_device_refuses(restored_seams: None) -> None:
    """Guards: refusals that are written and never installed, or for one device alone."""
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    from morphserve.integration.worker import worker
    from morphserve.integration.worker.cuda import hooks

    worker.install_worker_seams()
    for method in _TARGETS:
        assert any((patch.owner, patch.name) == (Worker, method) for patch in seams.patches()), method
        assert method not in vars(CPUWorker), "a CPU's worker has one of its own, past the refusal"
    hooks.install_cuda_seams(worker._allocate_kv_cache)
    assert any((patch.owner, patch.name) == (Worker, "determine_available_memory") for patch in seams.patches())


def test_a_worker_refuses_where_it_has_layers(monkeypatch: pytest.MonkeyPatch, restored_seams: None) -> None:
    """Guards: refusals that ask what is never so, or always: weights that a restore undoes, taken without a word; an
    engine without MorphServe that can no longer take any."""
    from vllm.v1.worker.gpu_worker import Worker

    from morphserve.integration.worker import state, worker

    called: list[str] = []
    monkeypatch.setattr(Worker, "reload_weights", lambda self: called.append("reload_weights"))
    monkeypatch.setattr(state, "_rank", state.Rank())
    worker.install_worker_seams()
    object.__new__(Worker).reload_weights()
    assert called == ["reload_weights"]
    monkeypatch.setattr(state, "_rank", state.Rank(layers=SimpleNamespace()))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="reload_weights: MorphServe swaps"):
        object.__new__(Worker).reload_weights()
    assert called == ["reload_weights"]


@pytest.mark.parametrize("method", [*_TARGETS, "load_model", "apply_model", "check_health"])
def test_the_engine_refuses_before_it_asks_its_ranks(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Guards: of several ranks that refuse vLLM reads the first answer, and takes the others for those to the next
    command; and a refusal of everything, or of engines without MorphServe."""
    from morphserve.integration.engine import wiring

    sent: list[str] = []
    call = wiring._collective_rpc(lambda self, method, *args, **kwargs: sent.append(method))
    stock = SimpleNamespace(scheduler=SimpleNamespace())
    call(stock, method)
    call(SimpleNamespace(), method)  # an engine that is being made has no scheduler yet
    assert sent == [method] * 2
    ours = SimpleNamespace(scheduler=SimpleNamespace(morph=object()))
    if method == "check_health":
        call(ours, method)
        call(ours, keeps_weights(lambda worker: None))
        call(ours, logit_meter.install)
        assert len(sent) == 5
        return
    with pytest.raises(ConfigError, match=f"{method}: MorphServe swaps decoder layers"):
        call(ours, method)
    assert len(sent) == 2


def test_the_engine_refuses_functions_that_it_does_not_know() -> None:
    """Guards: weights that a function of a caller's loads on each rank, and that last until the next restore."""
    from morphserve.integration.engine import wiring

    sent: list[Any] = []
    call = wiring._collective_rpc(lambda self, method, *args, **kwargs: sent.append(method))
    ours = SimpleNamespace(scheduler=SimpleNamespace(morph=object()))
    stranger = SimpleNamespace(__module__="morphserve_of_others.weights")
    for function in (lambda worker: None, functools.partial(logit_meter.install), SimpleNamespace(), stranger):
        with pytest.raises(ConfigError, match="function .*: MorphServe swaps .* morphserve_keeps_weights = True"):
            call(ours, function)
        call(SimpleNamespace(scheduler=SimpleNamespace()), function)
    assert len(sent) == 4


def fixed(num_bytes: int | None, of_graphs: int) -> Any:
    return SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_memory_bytes=num_bytes),
        model_runner=SimpleNamespace(profile_cudagraph_memory=lambda: of_graphs),
    )


def test_a_given_kv_size_leaves_room_for_all_graph_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: --kv-cache-memory-bytes, past which vLLM counts no graphs, and captures that find no memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 20 * GIB))
    budget.check_fixed_kv(fixed(8 * GIB, 2 * GIB), 4)
    budget.check_fixed_kv(fixed(9 * GIB, 2 * GIB), 1)
    budget.check_fixed_kv(fixed(9 * GIB, 0), 4)  # eager
    words = r"kv_cache_memory_bytes: 9,663,676,416 B, .* 4 levels .* 2,147,483,648 B: .* at most 8,589,934,592 B"
    with pytest.raises(ConfigError, match=words):
        budget.check_fixed_kv(fixed(9 * GIB, 2 * GIB), 4)


def test_what_is_measured_is_not_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a second capture for an estimate at each start."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: pytest.fail("asked"))
    worker = fixed(None, 0)
    worker.model_runner.profile_cudagraph_memory = lambda: pytest.fail("captured")
    budget.check_fixed_kv(worker, 4)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own workspace, in host memory."""
    from vllm.v1.worker import workspace

    monkeypatch.setattr(workspace, "_manager", None)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    workspace.init_workspace_manager(torch.device("cpu"))
    return workspace


def capture(scratch: Any, num_bytes: int) -> None:
    """Both runners': graphs use so much scratch memory and something of their own; locked behind the capture."""
    manager = scratch.current_workspace_manager()
    manager.get_simultaneous(((num_bytes,), torch.uint8))
    manager.get_persistent_resource(num_bytes, object)
    scratch.lock_workspace()


def of_graph_sets(scratch: Any, sizes: tuple[int, ...]) -> None:
    workspace = SharedWorkspace()
    for num_bytes in sizes:
        workspace.open()
        capture(scratch, num_bytes)
        workspace.check()


def test_later_graph_sets_are_captured_with_an_open_workspace(scratch: Any) -> None:
    """Guards: a second graph set that vLLM's lock stops; and steps that may move what graphs read."""
    of_graph_sets(scratch, (4096, 4096, 1024))
    assert scratch.current_workspace_manager().is_locked()
    with pytest.raises(AssertionError, match="Workspace is locked"):
        capture(scratch, 8192)


class Levels:
    """Captures a graph set for each of three levels."""

    def __init__(self, *args: Any) -> None:
        return

    def capture(self, original: Any, levels: Any, num_kv_blocks: int, **how: Any) -> int:
        return sum(original() for _ in range(3))


def captured_rank() -> SimpleNamespace:
    """What a rank has when graphs are captured."""
    layers, kv = SimpleNamespace(weights={}), SimpleNamespace(num_mapped=48)
    return SimpleNamespace(
        transition=object(), swapper=None, layers=layers, level_formats=(), kv=kv, graph_set_estimate=0
    )


def runner_of(**parts: Any) -> SimpleNamespace:
    return SimpleNamespace(
        vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(world_size_across_dp=1)), **parts
    )


def test_graph_sets_of_a_runner_that_always_locks(scratch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: graph sets of the V1 runner, whose capture takes no argument and leaves the workspace locked."""
    from morphserve.integration.worker.cuda import hooks

    rank = captured_rank()
    monkeypatch.setattr(hooks, "rank", lambda: rank)
    monkeypatch.setattr(hooks, "LevelGraphs", Levels)
    sizes = iter((4096, 1024, 2048))

    def capture_model(self: Any) -> int:
        capture(scratch, next(sizes))
        return 100

    assert hooks._capture_model(capture_model)(runner_of()) == 300
    assert scratch.current_workspace_manager().is_locked()
    sizes = iter((4096, 64 << 20, 4096))
    with pytest.raises(ConfigError, match="workspace of 67,108,864 B"):
        hooks._capture_model(capture_model)(runner_of())


def test_a_given_kv_size_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the check above, written and never called; and asked in an engine without MorphServe."""
    from morphserve.integration.worker.cuda import hooks

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 20 * GIB))
    monkeypatch.setattr(hooks, "rank", lambda: SimpleNamespace(layers=SimpleNamespace(num_graph_sets=4)))
    ask = hooks._available_memory(lambda self: 9 * GIB)
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        ask(fixed(9 * GIB, 2 * GIB))
    monkeypatch.setattr(hooks, "rank", lambda: SimpleNamespace(layers=None))
    assert ask(fixed(9 * GIB, 2 * GIB)) == 9 * GIB


def test_a_workspace_that_moves_under_the_graphs_before_is_refused(scratch: Any) -> None:
    """Guards: graphs of a level that read memory which is somebody else's by now."""
    with pytest.raises(ConfigError, match=r"workspace of 67,108,864 B, .* captured with one of 4,096 B"):
        of_graph_sets(scratch, (4096, 64 << 20))


def test_a_runner_without_a_workspace_has_graph_sets_too(scratch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a start that fails where vLLM has none."""
    monkeypatch.setattr(scratch, "_manager", None)
    workspace = SharedWorkspace()
    workspace.open()
    workspace.check()


def test_a_breakable_runner_is_there_before_its_graph_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: graphs of level 0, which no graph set has, replayed while another level is captured."""
    from morphserve.integration.worker.cuda import hooks

    called: list[str] = []

    class GraphSets(Levels):
        def __init__(self, *args: Any) -> None:
            called.append("graph_sets")

        def capture(self, *args: Any, **how: Any) -> int:
            return 0

    rank = captured_rank()
    monkeypatch.setattr(hooks, "rank", lambda: rank)
    monkeypatch.setattr(hooks, "LevelGraphs", GraphSets)
    for breakable, expected in ((True, ["model", "graph_sets"]), (False, ["graph_sets"])):
        manager = SimpleNamespace(use_breakable_cg=breakable, init_breakable_cg_runner=called.append)
        hooks._capture_model(lambda self: 0)(runner_of(cudagraph_manager=manager, model="model"))
        assert called == expected
        called.clear()


def test_an_engine_without_morphserve_that_comes_later_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: blocks without pages, five times the graphs' memory, weights that cannot be loaded again, in an engine
    that has nothing to do with us."""
    from morphserve.integration.worker import state, worker
    from morphserve.integration.worker.cuda import hooks

    closed: list[bool] = []
    residence = SimpleNamespace(close=lambda: closed.append(True))
    layers = SimpleNamespace(num_graph_sets=5)
    monkeypatch.setattr(state, "_rank", state.Rank(residence, layers, 48))  # type: ignore[arg-type]
    assert hooks._graph_memory(lambda self: 100)(object()) == 500
    load = worker._weights_loaded(lambda model, config, device: "loaded")
    assert load(None, None, torch.device("cpu")) == "loaded"
    left = state.rank()
    assert closed == [True] and left.residence is left.layers is left.base_num_blocks is left.transition is None
    assert hooks._graph_memory(lambda self: 100)(object()) == 100
    allocate = worker._allocate_kv_cache(lambda config, device: "stock")
    assert allocate(None, torch.device("cpu")) == "stock"


@pytest.mark.parametrize("given", [None, 100, 101])
def test_a_given_number_of_blocks_must_fit(monkeypatch: pytest.MonkeyPatch, given: int | None) -> None:
    """Guards: a start that runs out of memory minutes later, when the graphs of the last level are captured."""
    from morphserve.integration.engine import runtime

    count = given or 100
    config = SimpleNamespace(num_blocks=count, kv_cache_tensors=[SimpleNamespace(size=count * 4096)])
    cache = SimpleNamespace(num_gpu_blocks_override=given)
    described = [SimpleNamespace(page_bytes=4096, staging_bytes=None, left_out={}, kernels={}) for _ in range(2)]
    executor = SimpleNamespace(collective_rpc=lambda name: described)
    of_engine = runtime.EngineRuntime(
        SimpleNamespace(model_executor=executor), SimpleNamespace(cache_config=cache), MorphServeConfig()
    )
    assert of_engine.config.kv.blocks_per_step == 256, "one block or hundreds: as many operations on a device"
    for name in ("check_supported", "check_kinds"):
        monkeypatch.setattr(runtime, name, lambda *args: None)
    monkeypatch.setattr(runtime, "_granularity", Reached.stop)
    error, words = Reached, None
    if given == 101:
        error, words = ConfigError, "101 blocks take 413,696 B, and 409,600 B .* at most 100"
    with pytest.raises(error, match=words):
        of_engine.plan_kv(lambda *args: [config, config], None, [500_000, 409_600])


class Reached(Exception):
    """What comes after the check."""

    @staticmethod
    def stop(*args: Any) -> int:
        raise Reached


def test_kernels_of_a_shrink_are_loaded_before_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a first shrink that waits for its kernels beside requests; a warm-up that moves or loses a block's id."""
    from morphserve.integration.worker import kv as rank_kv
    from morphserve.integration.worker.cuda import hooks

    table = torch.tensor([[0, 5, 7]], dtype=torch.int32)
    runner: Any = SimpleNamespace(
        block_tables=SimpleNamespace(block_tables=[SimpleNamespace(gpu=table)], input_block_tables=[table.clone()]),
        kv_cache_config=SimpleNamespace(num_blocks=12),
    )
    kv = object.__new__(rank_kv.RankKV)
    copied: list[Any] = []
    kv._cache = SimpleNamespace(num_mapped=8, copy=copied.append)  # type: ignore[assignment]
    kv._wait, kv._num_blocks = lambda: None, 12
    told: list[Any] = []
    for name in ("rewrite_block_tables", "forget_blocks"):
        original = getattr(rank_kv, name)
        monkeypatch.setattr(rank_kv, name, lambda *args, own=original: (told.append(args[1:]), own(*args)))
    monkeypatch.setattr(hooks, "rank", lambda: SimpleNamespace(kv=kv))
    seen: list[Any] = []
    worker = SimpleNamespace(model_runner=runner)
    assert hooks._warm_up(lambda self: seen.append((runner.kv_cache_config.num_blocks, len(told))))(worker) is None
    assert seen == [(8, 0)] and runner.kv_cache_config.num_blocks == 12
    assert copied == [[(6, 7)], [(0, 4), (1, 5), (2, 6), (3, 7)]] and told == [([(6, 7)], 12), (12,)]
    kv._cache, kv._num_blocks = SimpleNamespace(num_mapped=800, copy=copied.append), 1000  # type: ignore[assignment]
    kv.warm_up(runner)
    assert copied[-1][0] == (736, 768) and len(copied[-1]) == 32, "more rows than torch's kernel for a few takes"
    assert table.tolist() == [[0, 5, 7]] and runner.block_tables.input_block_tables[0].tolist() == [[0, 5, 7]]
