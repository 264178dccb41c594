"""A set of CUDA graphs for every level, on a runner in miniature: captured at start, shown when the layers switch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from cpu.graph_memory import Cell
from cpu.graph_world import SIZES as WORLD_SIZES
from cpu.graph_world import Mode
from seams import graph_world_vllm
from seams.graph_world_vllm import VllmWorld, open_world
from vllm.compilation import breakable_cudagraph, cuda_graph
from vllm.config import CUDAGraphMode

from morphserve.integration.worker.cuda import graphs
from morphserve.integration.worker.cuda.graphs import LevelGraphs
from morphserve.residence import WeightSlot, register_op, reset

pytestmark = pytest.mark.seams

LEVELS = (("base", "base", "base"), ("w8", "base", "base"), ("w8", "w8", "base"), ("w8", "w8", "w8"))
SIZES = (1, 2, 4)


class Manager:
    """What keeps whole steps in the V2 runner."""

    def __init__(self) -> None:
        self.graphs: dict[Any, Any] = {}
        self._candidates = {(size, 0): [Descriptor(size)] for size in SIZES}
        self._capture_descs: dict[str, list[Any]] = {}


class Descriptor:
    def __init__(self, num_tokens: int) -> None:
        self.num_tokens, self.num_active_loras = num_tokens, 0
        self.cg_mode = type("Mode", (), {"name": "FULL"})


class Swapper:
    """Layers 4 to 6: the second stage of a pipeline whose first has 0 to 3."""

    def __init__(self) -> None:
        self.now = dict.fromkeys((4, 5, 6), "base")
        self.staged: dict[int, str] = {}

    def formats(self) -> dict[int, str]:
        return dict(self.now)


class Rank:
    def __init__(self, swapper: Swapper) -> None:
        self._swapper = swapper
        self.moves: list[tuple[dict[int, str], int]] = []

    def prepare(self, changes: dict[int, str]) -> None:
        assert not self._swapper.staged
        self._swapper.staged = changes

    def commit(self, has_layers: bool, num_kv_blocks: int) -> None:
        assert has_layers
        self.moves.append((self._swapper.staged, num_kv_blocks))
        self._swapper.now |= self._swapper.staged
        self._swapper.staged = {}

    def wait(self) -> None:
        return


class World:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.manager = Manager()
        self.runner = type("Runner", (), {"cudagraph_manager": self.manager})()
        monkeypatch.setattr(graphs, "_holders", lambda runner: [graphs.Holder(self.manager, "graphs")])
        self.swapper = Swapper()
        self.rank = Rank(self.swapper)
        self.levels = LevelGraphs(self.runner, self.swapper, self.rank)  # type: ignore[arg-type]
        self.num_captures = 0

    def capture(self) -> int:
        """vLLM's: a graph keeps the formats of its capture."""
        self.num_captures += 1
        for descriptors in self.manager._candidates.values():
            self.manager.graphs[descriptors[0]] = tuple(self.swapper.now.values())
        return 100

    def replayed(self) -> set[Any]:
        """What any step could replay now."""
        return {self.manager.graphs[d] for ds in self.manager._candidates.values() for d in ds}


def padded(level: tuple[str, ...], first_stage: str) -> tuple[str, ...]:
    return (first_stage,) * 4 + level


def test_each_level_replays_its_own_graphs_and_none_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a graph replayed with weights of another level, which gives wrong tokens and no error."""
    world = World(monkeypatch)
    levels = [padded(level, first) for level, first in zip(LEVELS, ("base", "base", "w8", "w8"), strict=True)]
    assert world.levels.capture(world.capture, levels, 48, kept=100) == 400
    assert world.num_captures == len(LEVELS)
    assert all(len(changes) == 1 and blocks == 48 for changes, blocks in world.rank.moves), "more than is reserved"
    assert tuple(world.swapper.now.values()) == LEVELS[0]
    assert world.replayed() == {LEVELS[0]}
    for level in (*LEVELS, LEVELS[0]):
        world.swapper.now = dict(zip((4, 5, 6), level, strict=True))
        world.levels.show()
        assert world.replayed() == {level}
    world.swapper.now[5] = "w8"  # half-way between two levels
    world.levels.show()
    assert world.replayed() == set(), "steps between two levels run without graphs"


def test_levels_that_look_the_same_from_here_are_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a pipeline stage that captures the levels of other stages again."""
    world = World(monkeypatch)
    levels = [padded(LEVELS[0], "base"), padded(LEVELS[1], "base"), padded(LEVELS[1], "w8")]
    assert world.levels.capture(world.capture, levels, 48, kept=100) == 200
    assert world.num_captures == 2


def test_a_capture_that_fails_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a server that goes on with half a graph set."""
    world = World(monkeypatch)

    def fail() -> int:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        world.levels.capture(fail, [padded(level, "base") for level in LEVELS], 48, kept=100)


class LookedUp(VllmWorld):
    """Its linears run through the operator that a compiled model has, which finds them by their weights."""

    def __init__(self) -> None:
        register_op()
        reset()
        self.parameters = [torch.zeros(2, 2) for _ in range(3)]
        for layer, weight in enumerate(self.parameters):
            WeightSlot(f"{layer}.qkv_proj", lambda x: x, weight)  # type: ignore[arg-type]
        super().__init__(num_layers=3)

    def _linear(self, layer: int, name: str, x: Cell) -> Cell:
        torch.ops.morphserve.linear_of(torch.zeros(1, 2), self.parameters[layer])
        return super()._linear(layer, name, x)


def looked_up(monkeypatch: pytest.MonkeyPatch, known: bool = True) -> tuple[LookedUp, Swapper, LevelGraphs]:
    world = open_world(monkeypatch, LookedUp)
    monkeypatch.setattr(cuda_graph.CUDAGraphWrapper, "_all_instances", WeakSet(world.wrappers))
    monkeypatch.setattr(breakable_cudagraph.BreakableCUDAGraphWrapper, "_all_instances", WeakSet())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: world.gpu.later)
    swapper = Swapper()
    weights = {weight.data_ptr(): layer for layer, weight in zip((4, 5, 6), world.parameters, strict=True)}
    levels = LevelGraphs(
        SimpleNamespace(cudagraph_manager=world.manager),
        swapper,  # type: ignore[arg-type]
        Rank(swapper),  # type: ignore[arg-type]
        weights if known else {},
    )
    return world, swapper, levels


def capture_of(world: LookedUp, swapper: Swapper) -> Callable[[], int]:
    """vLLM's capture: what its manager lists."""

    def capture() -> int:
        world.formats = tuple(swapper.now.values())
        descs = world.manager._capture_descs
        full, pieces = (
            [desc.num_tokens for desc in descs.get(CUDAGraphMode[mode], ())] for mode in ("FULL", "PIECEWISE")
        )
        world.capture_sizes(full, pieces)
        return 100 if full else 140

    return capture


@pytest.mark.parametrize("known", [True, False])
def test_levels_share_pieces_of_the_compiled_model(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """Guards: pieces that are captured again with each level, or replayed at a level that they do not belong to."""
    world, swapper, levels = looked_up(monkeypatch, known)
    ladder = [padded(level, "base") for level in LEVELS]
    # And two sets of pieces alone, with neighbours in the one format and the other.
    assert levels.capture(capture_of(world, swapper), ladder, 48, kept=200) == 400 + (2 * 140 if known else 0)
    # Layers go one by one, so each level changes one piece before a layer and one behind it; then two still lack one,
    # and get it for a step of one token and one of up to four.
    pieces, between = (4 + 2 + 2 + 2, 2) if known else (4 * 4, 0)
    assert world.num_captured() == pieces * len(WORLD_SIZES) + between * 2
    num_captured = world.num_captured()
    for level in (LEVELS[0], *product(("base", "w8"), repeat=3), LEVELS[0]):
        swapper.now = dict(zip((4, 5, 6), level, strict=True))
        world.formats = level
        levels.show()
        desc = world.manager.dispatch(1, 2, None, 0)  # a prefill, which has no graph of a whole step
        assert (desc.cg_mode.name == "PIECEWISE") == (known or level in LEVELS), level
        between = Mode.PIECEWISE if known else Mode.NONE
        assert world.step(2) is (Mode.FULL if level in LEVELS else between)
        world.run(desc)
    assert world.num_captured() == num_captured
    reset()


@pytest.mark.parametrize(
    ("sizes", "most_requests"),
    [((1, 2, 4, 8, 10, 12), 12), ((1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)), 256)],
    ids=["few", "default"],
)
def test_fewer_sizes_serve_all_steps(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], most_requests: int
) -> None:
    """Guards: KV cache of level 0 spent on graphs of sizes that padding serves; a step that this leaves without, or
    pads to many times its tokens: the full batch of a deep level, or whatever comes between two levels."""
    monkeypatch.setattr(graph_world_vllm, "SIZES", sizes)
    monkeypatch.setattr(graph_world_vllm, "MOST_REQUESTS", most_requests)
    world, swapper, levels = looked_up(monkeypatch)
    levels.capture(capture_of(world, swapper), [padded(level, "base") for level in LEVELS], 48, kept=200)
    offered: dict[str, set[int]] = {"level": set(), "between": set()}
    for formats in product(("base", "w8"), repeat=3):
        swapper.now = dict(zip((4, 5, 6), formats, strict=True))
        world.formats = formats
        levels.show()
        most = 1.0 if formats == LEVELS[0] else 4 / 3 if formats in LEVELS else 2.0
        for num_tokens in range(1, max(sizes) + 1):
            steps = [("PIECEWISE", world.manager.dispatch(1, num_tokens, None, 0))]
            if num_tokens <= most_requests:
                decode = world.manager.dispatch(num_tokens, num_tokens, 1, 0)
                steps.append(("FULL" if formats in LEVELS else "PIECEWISE", decode))
            for mode, desc in steps:
                stock = min(size for size in sizes if size >= num_tokens)
                assert desc.cg_mode.name == mode
                assert desc.num_tokens == stock or desc.num_tokens <= most * num_tokens, (formats, mode, num_tokens)
                if formats != LEVELS[0]:
                    offered["level" if formats in LEVELS else "between"].add(desc.num_tokens)
                if num_tokens < 30:
                    world.run(desc)
    assert offered["between"] < offered["level"] < set(sizes)
    reset()


def test_sets_of_pieces_take_no_more_than_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a device whose memory is all given out runs out of it in the last capture of a start."""
    world, swapper, levels = looked_up(monkeypatch)
    ladder = [padded(level, "base") for level in LEVELS]
    assert levels.capture(capture_of(world, swapper), ladder, 48, kept=199) == 100 * 4  # 297 B are left: not two sets
    assert levels.unused(199) == 3 * 199 - 3 * 100
    world, swapper, levels = looked_up(monkeypatch)
    assert levels.capture(capture_of(world, swapper), ladder, 48, kept=200) == 400 + 280
    assert levels.unused(200) == 3 * 200 - 3 * 100 - 280
    reset()


@pytest.mark.parametrize(
    "levels",
    [
        [("base",) * 6, ("fp8",) * 6],
        [("base",) * 5, ("fp8",) * 5, ("w4",) * 5],
        [("base",) * 6, ("fp8", "fp8", "base", "fp8", "base", "base"), ("w4", "fp8", "base", "w4", "base", "fp8")],
    ],
)
def test_neighbours_have_each_two_formats(levels: list[tuple[str, ...]]) -> None:
    """Guards: formats between two levels at which one piece of the model has no graph, and so none is used."""
    had = [set(column) for column in zip(*levels, strict=True)]
    found = [formats for both in graphs.alternations(levels) for formats in both]
    for place in range(len(had) - 1):
        assert {formats[place : place + 2] for formats in found} == set(product(had[place], had[place + 1]))


def test_two_that_had_a_format_at_different_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a start that ends because it captures formats twice, where neighbours had one and never together."""
    world, swapper, levels = looked_up(monkeypatch)
    ladder = [("base",) * 3, ("w8", "base", "base"), ("w4", "base", "base"), ("w4", "w8", "base")]
    levels.capture(capture_of(world, swapper), [padded(level, "base") for level in ladder], 48, kept=1000)
    for formats in product(("base", "w8", "w4"), ("base", "w8"), ("base",)):
        swapper.now = dict(zip((4, 5, 6), formats, strict=True))
        world.formats = formats
        levels.show()
        assert world.step(4) is (Mode.FULL if formats in ladder else Mode.PIECEWISE)
    reset()
