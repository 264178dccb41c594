"""Sets of CUDA graphs: what a step replays belongs to the formats that its layers have."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from cpu.graph_world import BASE, SIZES, Desc, GraphWorld, Key, Mode, at, scope_of
from hypothesis import given, settings
from hypothesis import strategies as st

from morphserve.residence import Formats, GraphSets, Holder, Offer, OutputAlias, narrow_candidates, narrow_keys, spaced
from morphserve.residence.graphs.caches import Watched

sizes = st.sets(st.sampled_from(SIZES)).map(sorted)


def ladder_of(num_layers: int, *passes: tuple[str, Sequence[int]]) -> list[Formats]:
    """Formats after each move: every pass gives its format to the layers in its order."""
    states = [(BASE,) * num_layers]
    for format, order in passes:
        for layer in order:
            states.append(at(states[-1], **{f"l{layer}": format}))
    return states


@st.composite
def ladders(draw: st.DrawFn) -> list[Formats]:
    num_layers = draw(st.integers(1, 4))
    orders = st.permutations(range(num_layers))
    formats = draw(st.sampled_from([["w8"], ["w4"], ["w8", "w4"]]))
    return ladder_of(num_layers, *((format, draw(orders)) for format in formats))


@settings(max_examples=100)
@given(st.data())
def test_a_step_computes_with_the_formats_of_its_layers(data: st.DataObject) -> None:
    """Guards: a replay of a graph of other formats, or of one that reads where another pass had its tensors."""
    states = data.draw(ladders())
    world = GraphWorld(len(states[0]), learns=data.draw(st.booleans()))
    later = data.draw(st.lists(st.integers(1, len(states) - 1), unique=True, max_size=3))
    full: dict[Formats, list[int]] = {}
    piecewise: dict[Formats, list[int]] = {}
    for index in [0, *later]:
        formats = states[index]
        full[formats] = data.draw(sizes) if index else list(SIZES)
        piecewise[formats] = data.draw(sizes) if index else list(SIZES)
        assert world.capture(formats, full[formats], piecewise[formats]) == bool(full[formats])
    scopes = [scope_of(piece, world.num_layers) for piece in range(world.num_layers + 1)]
    num_captured = world.num_captured()
    for index in data.draw(st.lists(st.integers(0, len(states) - 1), min_size=1, max_size=6)):
        formats = states[index]
        assert world.switch(formats) == bool(full.get(formats))
        in_pieces = set(SIZES)
        for scope in scopes:
            in_pieces &= {
                size
                for graph_set, of_graph_set in piecewise.items()
                for size in of_graph_set
                if all(graph_set[layer] == formats[layer] for layer in scope)
            }
        for num_tokens in range(1, max(SIZES) + 2):
            mode = world.step(num_tokens)  # checks what was computed
            if any(size >= num_tokens for size in full.get(formats, [])):
                assert mode is Mode.FULL
            else:
                assert (mode is Mode.PIECEWISE) == any(size >= num_tokens for size in in_pieces)
    assert world.num_captured() == num_captured


def test_level_zero_has_its_own_dictionaries_back() -> None:
    """Guards: at level 0 the server is not the stock server any more: other graphs, or other rules to choose them."""
    world = GraphWorld()
    table = world.manager._candidates
    base = world.formats
    world.capture(base)
    before = [getattr(holder.owner, holder.attribute) for holder in world.holders]
    assert all(before) and world.manager._candidates is table
    deep = ("w4",) * 3
    world.capture(deep, full=[1])
    assert world.manager._candidates is not table
    assert world.manager.graphs is not before[0]
    world.switch(base)
    after = [getattr(holder.owner, holder.attribute) for holder in world.holders]
    assert all(new is old for new, old in zip(after, before, strict=True))
    assert world.manager._candidates is table
    assert all(wrapper.graph_pool is world.gpu.home for wrapper in world.wrappers)
    assert not any(isinstance(wrapper.runnable, OutputAlias) for wrapper in world.wrappers)


@pytest.mark.parametrize("learns", [False, True])
def test_pieces_are_shared_between_levels(learns: bool) -> None:
    """Guards: capture that costs its full time and memory again with every level."""
    world = GraphWorld(4, learns)
    states = ladder_of(4, ("w4", [2, 0, 3, 1]))
    for formats in states:
        world.capture(formats)
    for piece, wrapper in enumerate(world.wrappers):
        reachable = {tuple(formats[layer] for layer in scope_of(piece, 4)) for formats in states}
        assert len(reachable) == (3 if 0 < piece < 4 else 2)
        assert set(wrapper.captured.values()) == {len(reachable)} and set(wrapper.captured) == set(SIZES)
    found = world.graph_sets.num_graphs()
    assert list(found) == states
    assert found[states[0]] == len(SIZES) * (1 + 5)
    assert sum(found.values()) == world.num_captured() + len(states) * len(SIZES)


def test_scopes_are_learned_anew_after_a_clear() -> None:
    """Guards: scopes of another model, or pieces that are told apart by all layers once graphs were cleared."""
    world = GraphWorld(4, learns=True)
    base = world.formats
    for _ in range(2):
        world.capture(base)
        for piece, cache in enumerate(world.graph_sets._caches[1:]):
            assert cache.holder.scope == scope_of(piece, 4)
        assert not any(isinstance(wrapper.runnable, Watched) for wrapper in world.wrappers)
        world.capture(("w4",) * 4)
        world.graph_sets.clear()
        world.formats = base
        assert all(cache.holder.scope is None for cache in world.graph_sets._caches)


def test_a_wrapper_of_another_model_says_nothing() -> None:
    """Guards: prefills without graphs at every level, because some other module's wrapper has none."""
    world = GraphWorld()
    stranger = SimpleNamespace(entries={}, runnable=None, graph_pool=None)
    holders = [*world.holders, Holder(stranger, "entries", full=False, learns=True)]
    world.graph_sets = GraphSets(holders, world.routes, later_pool=world.gpu.later, watch=world._watch)
    for formats in (world.formats, ("w4",) * 3):
        world.capture(formats, full=[])
        assert {world.step(size) for size in SIZES} == {Mode.PIECEWISE}


def test_what_was_not_seen_is_not_shared(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a linear that runs past the watch, and whose piece is then replayed at formats that it does not have."""
    world = GraphWorld(3, learns=True, blind_to=1)
    base = world.formats
    world.capture(base)
    assert "was seen to use layers [1]" in caplog.text
    changed = at(base, l1="w4")
    world.capture(changed)
    assert world.num_captured() == 2 * 4 * len(SIZES), "each level has pieces of its own"
    for formats in (base, changed):
        world.switch(formats)
        assert [world.step(size) for size in SIZES] == [Mode.FULL] * len(SIZES)
        assert world.manager.dispatch(1).num_tokens == 1
    world.capture(at(base, l0="w8"), full=[])
    assert {world.step(size) for size in SIZES} == {Mode.PIECEWISE}


def test_graphs_of_a_piece_have_one_place_for_inputs_and_outputs() -> None:
    """Guards: a shared graph that reads the address of another pass, where this pass's tensor does not lie."""
    world = GraphWorld()
    states = ladder_of(3, ("w8", [1, 0, 2]), ("w4", [0, 2, 1]))
    for formats in states:
        world.capture(formats)
    for cache, wrapper in zip(world.graph_sets._caches[1:], world.wrappers, strict=True):
        assert len(cache.by_formats) > 1
        for size in SIZES:
            entries = [entries[Key(size)] for entries in cache.by_formats.values()]
            assert len({tuple(entry.input_addresses) for entry in entries}) == 1, wrapper
            assert len({tuple(cell.address for cell in entry.output) for entry in entries}) == 1, wrapper


def test_formats_between_graph_sets_use_their_pieces() -> None:
    """Guards: every step of a transition runs eagerly, though each piece was captured with one graph set or another."""
    world = GraphWorld(4)
    base = world.formats
    first, last = at(base, l0="w4"), at(base, l3="w8")
    for formats in (base, first, last):
        world.capture(formats)
    assert not world.switch(at(base, l0="w4", l3="w8"))
    assert {world.step(num_tokens) for num_tokens in SIZES} == {Mode.PIECEWISE}
    assert not world.switch(at(base, l1="w4"))  # which no graph set has
    assert {world.step(num_tokens) for num_tokens in SIZES} == {Mode.NONE}


def test_a_graph_set_of_few_sizes_pads_or_falls_back() -> None:
    """Guards: an assertion of vLLM's, or a capture while serving, where a graph set lacks what level 0 has."""
    world = GraphWorld()
    base, deep = world.formats, ("w4",) * 3
    world.capture(base)
    world.capture(deep, full=[2], piecewise=[2, 4])
    num_captured = world.num_captured()
    world.switch(deep)
    assert [world.step(num_tokens) for num_tokens in range(1, 6)] == [
        Mode.FULL, Mode.FULL, Mode.PIECEWISE, Mode.PIECEWISE, Mode.NONE,
    ]  # fmt: skip
    world.switch(("w8",) * 3)
    assert {world.step(num_tokens) for num_tokens in range(1, 6)} == {Mode.NONE}
    assert world.num_captured() == num_captured


def test_narrowing_leaves_the_table_whole() -> None:
    """Guards: level 0 never has its own rules back."""
    candidates = {
        (n, loras): [Desc(mode, 2, loras) for mode in (Mode.FULL, Mode.PIECEWISE)] for n in range(3) for loras in (0, 1)
    }
    before = {key: list(descs) for key, descs in candidates.items()}
    offer = Offer(frozenset([Desc(Mode.FULL, 2, 0)]), frozenset([Key(2, 1)]))
    narrowed = narrow_candidates(candidates, offer)
    assert candidates == before
    assert narrowed == {
        (n, loras): [Desc(Mode.PIECEWISE, 2, 1) if loras else Desc(Mode.FULL, 2, 0)]
        for n in range(3)
        for loras in (0, 1)
    }
    keys = {Mode.PIECEWISE: {Key(1), Key(2)}, Mode.FULL: {Key(1), Key(2)}}
    assert narrow_keys(keys, Offer(frozenset([Key(1)]), frozenset([Key(2)]))) == {
        Mode.PIECEWISE: {Key(2)}, Mode.FULL: {Key(1)},
    }  # fmt: skip
    assert keys == {Mode.PIECEWISE: {Key(1), Key(2)}, Mode.FULL: {Key(1), Key(2)}}


@given(st.sets(st.integers(1, 600), max_size=40), st.sampled_from([1.0, 4 / 3, 2.0]))
def test_fewer_sizes_pad_little(sizes: set[int], most_padding: float) -> None:
    """Guards: a step above level 0 that computes far more rows than it has; a size that is kept for nothing."""
    kept = spaced(sizes, most_padding)
    assert kept <= sizes
    for num_tokens in range(1, max(sizes, default=0) + 1):
        stock, ours = (min(size for size in some if size >= num_tokens) for some in (sizes, kept))
        assert ours == stock or ours <= most_padding * num_tokens
    of_vllm = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]
    assert [len(spaced(of_vllm, most)) for most in (1.0, 4 / 3, 2.0)] == [51, 18, 9]
