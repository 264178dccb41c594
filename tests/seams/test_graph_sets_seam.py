"""Graph sets on vLLM's own objects: wrappers that capture, tables that choose. The device under them is a miniature."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from cpu.graph_world import BASE, SIZES, Mode, at
from seams.graph_world_vllm import VllmWorld, config, context, open_world
from vllm.compilation import breakable_cudagraph
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

from morphserve.residence import GraphSetError, GraphSets, Holder, Route, narrow_keys

DEEP = ("w4",) * 3


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> VllmWorld:
    return open_world(monkeypatch)


def test_vllms_dispatch_takes_what_the_graph_set_has(world: VllmWorld) -> None:
    """Guards: FULL, then PIECEWISE of the same formats, then eager: not what vLLM does any more."""
    base = world.formats
    table = world.manager._candidates
    assert world.capture(base)
    assert world.manager._candidates is table
    assert [world.step(n) for n in range(1, 6)] == [Mode.FULL] * 4 + [Mode.NONE]
    assert world.capture(DEEP, full=[2], piecewise=[2, 4])
    first, last = at(base, l0="w8"), at(base, l2="w4")
    for formats in (first, last):
        world.capture(formats, full=[])
    num_captured = world.num_captured()
    assert num_captured == 4 * 3 + 4 * 2 + 2 * 3 + (3 + 1)  # the last piece of `last` is that of DEEP, but for size 1
    assert world.switch(DEEP)
    assert [world.step(n) for n in range(1, 6)] == [
        Mode.FULL, Mode.FULL, Mode.PIECEWISE, Mode.PIECEWISE, Mode.NONE,
    ]  # fmt: skip
    assert not world.switch(at(base, l0="w8", l2="w4"))  # between graph sets: pieces of both
    assert [world.step(n) for n in range(1, 6)] == [Mode.PIECEWISE] * 4 + [Mode.NONE]
    assert not world.switch(at(base, l1="w4"))
    assert [world.step(n) for n in range(1, 6)] == [Mode.NONE] * 5
    assert world.switch(base)
    assert world.manager._candidates is table
    assert [world.step(n) for n in range(1, 6)] == [Mode.FULL] * 4 + [Mode.NONE]
    assert world.num_captured() == num_captured


def test_a_prefill_takes_pieces(world: VllmWorld) -> None:
    """Guards: a batch that no whole-step graph fits falls to eager because tables were narrowed."""
    world.capture(world.formats)
    world.capture(DEEP, full=[4])
    for formats in (world.formats, (BASE,) * 3):
        world.switch(formats)
        desc = world.manager.dispatch(1, 3, None, 0)
        assert (desc.cg_mode, desc.num_tokens) == (CUDAGraphMode.PIECEWISE, 4)


def test_vllms_wrapper_is_refused_a_capture(world: VllmWorld) -> None:
    """Guards: a wrapper that keeps its entries elsewhere by now, and captures while serving."""
    world.capture(world.formats)
    world.switch(DEEP)
    num_captured = world.num_captured()
    world.gpu.may_capture = True
    with pytest.raises(GraphSetError, match="where 0 graphs"):
        world.forward(Mode.PIECEWISE, 2)
    assert world.num_captured() == num_captured


def test_a_breakable_wrapper_has_graph_sets_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the same for the piecewise graphs that come without torch.compile."""
    monkeypatch.setattr(
        breakable_cudagraph, "current_platform", SimpleNamespace(get_global_graph_pool=lambda: (0, 0))
    )
    ran: list[str] = []
    wrapper = breakable_cudagraph.BreakableCUDAGraphWrapper(lambda: ran.append("eager"), config())
    graph_sets = GraphSets([Holder(wrapper, "entries", full=False)])
    graph_sets.begin((BASE,))
    captured = SimpleNamespace(replay=lambda: ran.append("replay"))
    entry = breakable_cudagraph._BreakableEntry(BatchDescriptor(1), capture=captured)
    wrapper.entries[BatchDescriptor(1)] = entry
    wrapper.entries[BatchDescriptor(2)] = breakable_cudagraph._BreakableEntry(BatchDescriptor(2))  # it failed
    assert not graph_sets.end()
    assert graph_sets.num_graphs() == {(BASE,): 1}
    with context("PIECEWISE", 1):
        wrapper()
    assert ran == ["replay"]
    graph_sets.switch(("w4",))
    with context("NONE", 1):
        wrapper()
    assert ran == ["replay", "eager"]
    with context("PIECEWISE", 1), pytest.raises(GraphSetError, match="where 0 graphs"):
        wrapper()


def test_the_dispatcher_of_the_v1_runner_falls_back_too() -> None:
    """Guards: the same for the V1 runner, whose table is another."""
    dispatcher = object.__new__(CudagraphDispatcher)
    dispatcher.vllm_config = config()
    dispatcher.compilation_config = dispatcher.vllm_config.compilation_config
    dispatcher.uniform_decode_query_len, dispatcher.specialize_lora_count = 1, False
    dispatcher.cudagraph_keys = {CUDAGraphMode.PIECEWISE: set(), CUDAGraphMode.FULL: set()}
    dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE)
    keys = dispatcher.cudagraph_keys
    whole, piece = (
        SimpleNamespace(concrete_cudagraph_entries={}, runnable=None, graph_pool=None) for _ in range(2)
    )
    graph_sets = GraphSets(
        [Holder(whole, "concrete_cudagraph_entries"), Holder(piece, "concrete_cudagraph_entries", (0,))],
        [Route(dispatcher, "cudagraph_keys", narrow_keys)],
        later_pool=(0, 1),
    )

    def capture(formats: tuple[str, ...], full: set[int]) -> None:
        graph_sets.begin(formats)
        assert dispatcher.cudagraph_keys is keys  # vLLM captures what its own table has
        for holder, mode in ((whole, CUDAGraphMode.FULL), (piece, CUDAGraphMode.PIECEWISE)):
            for desc in keys[mode]:
                if mode is CUDAGraphMode.PIECEWISE or desc.num_tokens in full:
                    entry = SimpleNamespace(cudagraph=object(), output=(), input_addresses=[])
                    holder.concrete_cudagraph_entries[desc] = entry
        graph_sets.end()

    def modes() -> list[str]:
        return [dispatcher.dispatch(n, uniform_decode=True)[0].name for n in range(1, 6)]

    capture((BASE,), set(SIZES))
    assert modes() == ["FULL"] * 4 + ["NONE"]
    graph_sets.switch(("w4",))  # narrowed to nothing
    capture(("w4",), {1, 2})
    assert modes() == ["FULL", "FULL", "PIECEWISE", "PIECEWISE", "NONE"]
    graph_sets.switch(("w8",))
    assert modes() == ["NONE"] * 5
    graph_sets.switch((BASE,))
    assert dispatcher.cudagraph_keys is keys and modes() == ["FULL"] * 4 + ["NONE"]
