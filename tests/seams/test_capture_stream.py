"""All graph sets are captured on one stream: on another, torch's allocator reuses nothing of what earlier ones took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from vllm.distributed import parallel_state

from morphserve.integration.worker.cuda.capture_stream import one_capture_stream
from morphserve.integration.worker.ops.opaque_linear import reset
from tests.seams.test_level_graphs import LEVELS, World, capture_of, looked_up, padded


class Group:
    """A group of ranks, as far as a capture goes: what it is told is what the capture runs on."""

    def __init__(self) -> None:
        self.streams: list[Any] = []

    @contextmanager
    def graph_capture(self, context: Any) -> Iterator[Any]:
        self.streams.append(context.stream)
        yield context


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    found = Group()
    for name in ("get_tp_group", "get_pp_group", "get_dp_group"):
        monkeypatch.setattr(parallel_state, name, lambda: found, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: object())
    return found


def captured(group: Group) -> Any:
    with parallel_state.graph_capture(torch.device("cpu")) as context:  # vLLM's own
        assert set(group.streams[-3:]) <= {context.stream}, "groups and capture on one stream"
        return context.stream


def test_captures_share_the_first_stream_and_stock_has_its_own_again(group: Group) -> None:
    """Guards: the working memory of a step taken once for each graph set; and a patch that stays."""
    made = parallel_state.GraphCaptureContext
    with one_capture_stream():
        streams = [captured(group) for _ in range(3)]
    assert streams[0] is streams[1] is streams[2]
    assert parallel_state.GraphCaptureContext is made
    assert captured(group) is not captured(group), "as vLLM does it"


def test_a_capture_that_fails_leaves_vllm_as_it_was(group: Group) -> None:
    """Guards: a stream of a dead capture that a later engine of this process gets."""
    made = parallel_state.GraphCaptureContext
    with pytest.raises(RuntimeError), one_capture_stream():
        captured(group)
        raise RuntimeError("out of memory")
    assert parallel_state.GraphCaptureContext is made


def test_all_levels_are_captured_on_one_stream(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a level that is captured outside."""
    world = World(monkeypatch)

    def capture() -> int:
        captured(group)
        return world.capture()

    world.levels.capture(capture, [padded(level, "base") for level in LEVELS], 48, kept=100)
    assert len(group.streams) == 3 * len(LEVELS)
    assert len(set(group.streams)) == 1


def test_sets_beside_levels_are_captured_on_it_too(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: sets of pieces alone that take a step's working memory anew, and are left out for want of it."""
    world, swapper, levels = looked_up(monkeypatch)
    of_world = capture_of(world, swapper)

    def capture() -> int:
        captured(group)
        return of_world()

    levels.capture(capture, [padded(level, "base") for level in LEVELS], 48, kept=200)
    assert len(group.streams) == 3 * (len(LEVELS) + 2)
    assert len(set(group.streams)) == 1
    reset()
