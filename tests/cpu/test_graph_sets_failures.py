"""Sets of CUDA graphs where something is missing, fails, or is done in another order."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from cpu.graph_memory import Gpu, Graph
from cpu.graph_world import BASE, SIZES, Desc, Entry, GraphWorld, Mode, at

from morphserve.residence import GraphSetError, GraphSets, Holder, OutputAlias
from morphserve.residence.graphs.output_alias import land


def test_a_capture_while_serving_is_refused() -> None:
    """Guards: a table that nobody narrowed has vLLM capture in the middle of serving, on one rank of several."""
    world = GraphWorld()
    base = world.formats
    graph_sets = world.graph_sets = GraphSets(world.holders, later_pool=world.gpu.later)  # without the route
    world.capture(base)
    assert world.step(1) is Mode.FULL
    world.switch(("w4",) * 3)
    with pytest.raises(AssertionError, match="No cudagraph"):
        world.step(1)
    world.manager._candidates = {(1, 0): [Desc(Mode.PIECEWISE, 1)]}
    world.gpu.may_capture = True  # the wrapper would
    with pytest.raises(GraphSetError, match=r"where 0 graphs.*add its Route"):
        world.step(1)
    world.switch(base)
    world.manager._candidates = {(1, 0): [Desc(Mode.PIECEWISE, 3)]}
    with pytest.raises(GraphSetError, match=f"where {len(SIZES)} graphs"):  # level 0's are complete too
        world.step(1)
    assert graph_sets.live == base


def test_a_graph_that_reads_elsewhere_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: trust that a later pass passes the same addresses, where it does not."""
    world = GraphWorld()
    base, deep = world.formats, ("w4",) * 3
    world.capture(base)
    ids, world.ids = world.ids, world.gpu.empty()
    with caplog.at_level(logging.WARNING):
        world.capture(deep, full=[])
    assert f"{len(SIZES)} CUDA graphs do not read where level 0's do" in caplog.text
    world.ids = ids
    assert {world.step(num_tokens) for num_tokens in SIZES} == {Mode.NONE}
    world.switch(base)
    assert {world.step(num_tokens) for num_tokens in SIZES} == {Mode.FULL}


@pytest.mark.parametrize("failing_piece", range(4))
def test_a_capture_that_fails_half_way_leaves_what_it_has(failing_piece: int) -> None:
    """Guards: out of memory while graphs are captured, and vLLM goes on capturing in the middle of serving."""
    world = GraphWorld()
    base, deep = world.formats, ("w4",) * 3
    world.capture(base)
    wrapper = world.wrappers[failing_piece]
    runnable = wrapper.runnable

    def fail(*args: Any) -> Any:
        if world.num_tokens == 2 and world.mode is Mode.PIECEWISE:
            raise MemoryError("out of memory")
        return runnable(*args)

    wrapper.runnable = fail
    with pytest.raises(MemoryError):
        world.capture(deep)
    assert wrapper.runnable is fail
    wrapper.runnable = runnable
    assert all(wrapper.graph_pool is world.gpu.home for wrapper in world.wrappers)
    assert [world.step(num_tokens) for num_tokens in SIZES] == [Mode.PIECEWISE] * 3  # padded to 4, which was first
    world.switch(base)
    assert {world.step(num_tokens) for num_tokens in SIZES} == {Mode.FULL}


def test_a_size_that_the_first_graph_set_lacks_is_refused() -> None:
    """Guards: a later graph whose outputs have no place that the other pieces read."""
    world = GraphWorld()
    world.capture(world.formats, piecewise=[1, 4])
    with pytest.raises(GraphSetError, match="every size"):
        world.capture(("w4",) * 3)
    with pytest.raises(GraphSetError, match="the first one lacks"):  # the first piece's home takes no more
        world.capture(("base", "w4", "w4"))
    world.switch(("base",) * 3)
    assert [world.step(num_tokens) for num_tokens in (1, 2, 4)] == [Mode.FULL] * 3


def test_steps_out_of_order_are_errors() -> None:
    """Guards: graphs of one level in the dictionaries of another."""
    world = GraphWorld()
    graph_sets, base, deep = world.graph_sets, world.formats, ("w4",) * 3
    assert graph_sets.live is None
    with pytest.raises(GraphSetError, match="call begin first"):
        graph_sets.end()
    assert not graph_sets.has_full(base)
    world.capture(base)
    assert graph_sets.has_full(base) and not graph_sets.has_full(deep)
    with pytest.raises(GraphSetError, match="captured once"):
        graph_sets.begin(base)
    graph_sets.begin(deep)
    assert graph_sets.live == deep
    for call in (graph_sets.begin, graph_sets.switch):
        with pytest.raises(GraphSetError, match="call end first"):
            call(base)
    assert not graph_sets.end()
    assert graph_sets.live == deep
    with pytest.raises(GraphSetError, match="they need two"):
        GraphSets(world.holders)


@pytest.mark.parametrize("while_capturing", [False, True])
def test_clear_drops_all(while_capturing: bool) -> None:
    """Guards: graphs that outlive what they read, such as a KV cache; and graph sets that cannot be made again."""
    world = GraphWorld()
    base, deep = world.formats, ("w4",) * 3
    world.capture(base)
    world.capture(deep)
    runnables = [wrapper.runnable for wrapper in world.wrappers]
    if while_capturing:
        world.graph_sets.begin(("w8",) * 3)
    world.graph_sets.clear()
    assert world.graph_sets.num_graphs() == {} and world.graph_sets.live is None
    assert [wrapper.runnable for wrapper in world.wrappers] == runnables
    assert {world.step(num_tokens) for num_tokens in SIZES} == {Mode.NONE}
    for formats in (base, deep):
        assert not world.switch(formats)
        assert world.step(1) is Mode.NONE
    assert world.capture(deep) and world.step(1) is Mode.FULL


def test_a_rank_of_a_pipeline_keeps_its_full_graphs() -> None:
    """Guards: a change on another rank's layers costs this rank its graphs, or has it capture them twice."""
    world = GraphWorld(2)
    full = Holder(world.manager, "graphs", scope=(0, 1), full=True)
    world.graph_sets = GraphSets([full, *world.holders[1:]], world.routes, later_pool=world.gpu.later)
    world.formats += (BASE,)  # of a layer that lies on another rank
    base = world.formats
    world.graph_sets.begin(base)
    world.manager.graphs[Desc(Mode.FULL, 1)] = graph = object()
    assert world.graph_sets.end()
    assert world.graph_sets.has_full(at(base, l2="w4"))
    with pytest.raises(GraphSetError, match="captured once"):
        world.graph_sets.begin(at(base, l2="w4"))
    assert world.graph_sets.switch(at(base, l2="w4"))
    assert world.manager.graphs[Desc(Mode.FULL, 1)] is graph
    assert not world.graph_sets.switch(at(base, l1="w4"))


def test_landing_acts_on_the_call_that_is_captured_only() -> None:
    """Guards: a warm-up, or the capture of a whole step, that writes over what lies between the pieces."""
    gpu = Gpu()
    place, made = gpu.compute("home"), gpu.compute("new")
    entries: dict[str, Entry] = {}
    output_alias = OutputAlias(lambda: (made, 7), entries, {"size": Entry(output=(place, None))})  # type: ignore[arg-type]
    assert output_alias()[0] is made  # a warm-up: no descriptor yet
    entries["size"] = Entry()
    assert gpu.memory[place.address] != gpu.memory[made.address]
    assert output_alias() == (place, 7)
    assert gpu.memory[place.address] == gpu.memory[made.address]
    entries["size"].cudagraph = Graph(gpu)
    assert output_alias()[0] is made
    entries["other"] = Entry()
    with pytest.raises(GraphSetError, match="every size"):
        output_alias()


def test_outputs_of_another_form_do_not_land() -> None:
    """Guards: a copy that broadcasts, or drops an output, because the model was compiled anew in between."""
    gpu = Gpu()
    one, other = gpu.empty(), gpu.empty()
    with pytest.raises(GraphSetError, match="2 outputs"):
        land([one, one], [other])
    other.shape = (2,)
    with pytest.raises(GraphSetError, match=r"shape \[1\], in the first graph set it had \[2\]"):
        land([one], [other])
