"""A bank of CUDA graphs for every level, on a runner in miniature: captured at start, shown when the layers switch."""

from __future__ import annotations

from typing import Any

import pytest

from morphserve.integration.device import graphs
from morphserve.integration.device.graphs import LevelGraphs

pytestmark = pytest.mark.seams

LEVELS = (("base", "base", "base"), ("w8", "base", "base"), ("w8", "w8", "base"), ("w8", "w8", "w8"))
SIZES = (1, 2, 4)


class Manager:
    """What keeps whole steps in the V2 runner."""

    def __init__(self) -> None:
        self.graphs: dict[Any, Any] = {}
        self._candidates = {(size, 0): [Descriptor(size)] for size in SIZES}


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
        self.captured_last: list[bool] = []

    def capture(self, last: bool) -> int:
        """vLLM's: a graph keeps the formats of its capture."""
        self.captured_last.append(last)
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
    assert world.levels.capture(world.capture, levels, 48) == 400
    assert world.captured_last == [False, False, False, True], "vLLM locks its workspace behind the last one"
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
    """Guards: a pipeline stage that captures the levels of other stages again, or never captures the last one."""
    world = World(monkeypatch)
    levels = [padded(LEVELS[0], "base"), padded(LEVELS[1], "base"), padded(LEVELS[1], "w8")]
    assert world.levels.capture(world.capture, levels, 48) == 200
    assert world.captured_last == [False, True]


def test_a_capture_that_fails_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a server that goes on with half a bank."""
    world = World(monkeypatch)

    def fail(last: bool) -> int:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        world.levels.capture(fail, [padded(level, "base") for level in LEVELS], 48)
