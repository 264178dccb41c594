"""Several stages and slices: what a level may publish, and in which order layers are taken."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from levels import swapped_layers

from morphserve.config import LadderConfig, LadderStep
from morphserve.control.budget import RankBytes, alternate, balance, kv_granularity, most_uneven, paid_blocks, stage_of
from morphserve.control.ladder import ProfileLadder, build_ladder
from morphserve.errors import ConfigError
from policies import BASE_FORMAT, Ladder
from tests.fakes import pipeline

pytestmark = pytest.mark.cpu

BASE_BLOCKS = 20


@st.composite
def stages(draw: st.DrawFn) -> list[RankBytes]:
    """Up to three stages of up to two ranks each, whose slices are not quite equal."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    num_layers = sum(lengths)
    sizes = st.lists(
        st.tuples(st.integers(100, 120), st.integers(200, 240), st.integers(400, 480)),
        min_size=num_layers,
        max_size=num_layers,
    )
    width = draw(st.integers(1, 2))
    ranks = []
    for stage, length in enumerate(lengths):
        first = sum(lengths[:stage])
        for _ in range(width):
            w4, w8, base = zip(*draw(sizes), strict=True)
            layers = {
                fmt: [size if first <= i < first + length else 0 for i, size in enumerate(column)]
                for fmt, column in ((BASE_FORMAT, base), ("w8", w8), ("w4", w4))
            }
            ranks.append(RankBytes(layers, draw(st.integers(20, 40)) * length, draw(st.sampled_from((1, 2, 5)))))
    return ranks


def num_layers_of(ranks: Sequence[RankBytes]) -> int:
    return len(ranks[0].layers[BASE_FORMAT])


@given(ranks=stages(), per_level=st.integers(1, 5), cap=st.none() | st.integers(BASE_BLOCKS, 60), data=st.data())
def test_no_rank_pays_for_blocks_that_it_has_not_freed(
    ranks: list[RankBytes], per_level: int, cap: int | None, data: st.DataObject
) -> None:
    """Guards rule 4: at rest a rank holds more than at level 0; or blocks that all could pay for are left out."""
    num_layers = num_layers_of(ranks)
    order = data.draw(st.permutations(range(num_layers)))
    steps = [LadderStep(format=fmt, layers_per_level=per_level) for fmt in ("w8", "w4")]
    ladder = build_ladder(num_layers, ranks, LadderConfig(order=list(order), steps=steps), BASE_BLOCKS, cap)
    for level in ladder:
        spare = []
        granularity = kv_granularity(ranks)  # BASE_BLOCKS is a multiple of all of them
        for rank in ranks:
            held = rank.weight(level.layer_formats) + level.num_kv_blocks * rank.kv_block_bytes
            budget = rank.weight(ladder[0].layer_formats) + BASE_BLOCKS * rank.kv_block_bytes
            assert held <= budget
            spare.append(budget - held >= rank.kv_block_bytes * granularity)
        assert level.num_kv_blocks % granularity == 0, "blocks that share a page with others that are not there"
        is_capped = cap is not None and cap - level.num_kv_blocks < granularity
        assert is_capped or not all(spare), "every rank could have paid for one more"
        assert level.weight_bytes == max(rank.weight(level.layer_formats) for rank in ranks)
    for shallow, deep in zip(ladder, ladder[1:], strict=False):
        assert deep.num_kv_blocks >= shallow.num_kv_blocks and deep.weight_bytes <= shallow.weight_bytes


@given(ranks=stages(), data=st.data())
def test_stages_free_within_one_layer_of_each_other(ranks: list[RankBytes], data: st.DataObject) -> None:
    """Guards: levels whose KV waits for one stage while another has freed for nothing; or an order that is lost."""
    num_layers = num_layers_of(ranks)
    order = list(data.draw(st.permutations(range(num_layers))))
    formats = [BASE_FORMAT] * num_layers
    taken = balance(ranks, order, formats, "w8")
    held = {stage_of(ranks, layer) for layer in order}
    assert sorted(taken) == sorted(order)
    for stage in held:
        assert [x for x in taken if stage_of(ranks, x) == stage] == [x for x in order if stage_of(ranks, x) == stage]
    base = tuple(formats)

    def gain(rank: RankBytes, layer: int) -> float:
        return (rank.layers[BASE_FORMAT][layer] - rank.layers["w8"][layer]) / rank.kv_block_bytes

    largest = max(gain(rank, layer) for rank in ranks for layer in range(num_layers))
    for place, layer in enumerate(taken):
        formats[layer] = "w8"
        left = {stage_of(ranks, x) for x in taken[place + 1 :]}
        if left == held:  # no stage has run out of layers
            paid = {
                stage: min((ranks[i].weight(base) - ranks[i].weight(formats)) / ranks[i].kv_block_bytes for i in stage)
                for stage in held
            }
            assert max(paid.values()) - min(paid.values()) <= largest + 1e-9


def test_one_stage_keeps_its_order() -> None:
    """Guards: a swap order that a profile has measured, shuffled where there is nothing to balance."""
    ranks = [RankBytes({BASE_FORMAT: [9, 8, 7], "w8": [4, 4, 4]}, 3)] * 2
    assert balance(ranks, [2, 0, 1], [BASE_FORMAT] * 3, "w8") == [2, 0, 1]
    assert alternate(ranks, [0, 1, 2]) == [0, 1, 2]


def test_steps_take_the_stages_in_turn() -> None:
    """Guards: front to back over two stages, where the second frees nothing before the first has freed all."""
    ranks = pipeline({BASE_FORMAT: [100] * 6, "w8": [60] * 6}, 60, 3)
    config = LadderConfig(order="front_to_back", steps=[LadderStep(format="w8", layers_per_level=2)])
    ladder = build_ladder(6, ranks, config, 10)
    assert [swapped_layers(level) for level in ladder] == [(), (0, 3), (0, 1, 3, 4), (0, 1, 2, 3, 4, 5)]
    assert [level.num_kv_blocks for level in ladder] == [10, 11, 12, 14]
    assert alternate(ranks, [0, 1, 2, 4, 5]) == [0, 4, 1, 5, 2]


def test_the_scarcest_rank_decides() -> None:
    """Guards: the mean, the sum or the first rank in place of the least."""
    ranks = pipeline({BASE_FORMAT: [100] * 4, "w8": [60] * 4}, 40, 2)
    assert paid_blocks(ranks, [BASE_FORMAT] * 4, ["w8", "w8", BASE_FORMAT, BASE_FORMAT]) == 0
    assert paid_blocks(ranks, [BASE_FORMAT] * 4, ["w8", "w8", "w8", BASE_FORMAT]) == 2


def test_levels_that_wait_for_one_stage_are_found() -> None:
    """Guards: a ladder that frees memory nobody gets, and nobody is told; or a warning about every ladder."""
    ranks = pipeline({BASE_FORMAT: [100] * 8, "w8": [40] * 8}, 40, 4)

    def ladder(**fields: object) -> Ladder:
        steps = [{"format": "w8", "layers_per_level": 2}]
        return build_ladder(8, ranks, LadderConfig.model_validate({"steps": steps, **fields}), 10)

    assert most_uneven(ranks, ladder()) is None
    assert most_uneven(ranks, ladder(order=[0, 1, 2, 3])) == (2, 0, 12)
    levels = ({}, {0: "w8", 1: "w8"}, dict.fromkeys(range(4), "w8"), dict.fromkeys(range(8), "w8"))
    profile = ProfileLadder(tuple(range(8)), levels, (0.0, 0.1, 0.2, 0.3))
    assert most_uneven(ranks, build_ladder(8, ranks, LadderConfig(), 10, profile=profile)) == (2, 0, 12)
    assert most_uneven(ranks[:1], ladder()[:1]) is None


@pytest.mark.parametrize(
    ("base", "w8", "words"),
    [
        (([100, 0], [0, 0]), ([60, 0], [0, 0]), r"'base' needs 2 .* \[0, 0\] for layer 1"),
        (([100, 0], [0, 100]), ([60, 0], [0, 0]), r"'w8' needs 2 .* \[0, 0\] for layer 1"),
        (([100, 0], [0, 100]), ([60, 5], [0, 60]), r"'w8' needs 2 .* \[5, 60\] for layer 1"),
    ],
)
def test_layers_that_ranks_do_not_agree_on_are_refused(
    base: tuple[list[int], ...], w8: tuple[list[int], ...], words: str
) -> None:
    """Guards: a layer that no rank holds, or that is there in one format only, makes a level for nothing."""
    ranks = [RankBytes({BASE_FORMAT: b, "w8": w}, 10) for b, w in zip(base, w8, strict=True)]
    config = LadderConfig.model_validate({"steps": [{"format": "w8"}]})
    with pytest.raises(ConfigError, match=words):
        build_ladder(2, ranks, config, 10)
