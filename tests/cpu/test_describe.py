"""One set of layer sizes for ranks that are not quite equal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from morphserve.integration.describe import RankDescription, common_layer_bytes

NUM_LAYERS = 3
SIZES = st.tuples(*[st.tuples(st.integers(900, 1000), st.integers(400, 600), st.integers(100, 300))] * NUM_LAYERS)


def describe(rank: int, sizes: tuple[tuple[int, int, int], ...]) -> RankDescription:
    base, w8, w4 = zip(*sizes, strict=True)
    return RankDescription(rank, {"base": base, "w8": w8, "w4": w4}, 100, {})


def test_equal_ranks_count_as_they_are() -> None:
    """Guards: sizes that are blown up, so that a level frees less KV than it pays for."""
    ranks = [describe(rank, ((1000, 500, 250), (900, 450, 240), (1000, 500, 250))) for rank in range(2)]
    assert common_layer_bytes(ranks) == common_layer_bytes(ranks[:1]) == ranks[0].layer_bytes


@given(st.lists(SIZES, min_size=1, max_size=3), st.lists(st.sampled_from(["base", "w8", "w4"]), min_size=3, max_size=3))
def test_what_is_freed_is_freed_on_every_rank(
    sizes: list[tuple[tuple[int, int, int], ...]], formats: list[str]
) -> None:
    """Guards rule 4: KV is granted for bytes that one rank has freed and another has not."""
    ranks = [describe(rank, found) for rank, found in enumerate(sizes)]
    common = common_layer_bytes(ranks)

    def total(layer_bytes: dict[str, tuple[int, ...]], wanted: list[str]) -> int:
        return sum(layer_bytes[fmt][layer] for layer, fmt in enumerate(wanted))

    base = ["base"] * NUM_LAYERS
    for rank in ranks:
        assert total(common, formats) >= total(rank.layer_bytes, formats)  # a chunk staged is never underrated
        freed = total(common, base) - total(common, formats)
        assert freed <= total(rank.layer_bytes, base) - total(rank.layer_bytes, formats)
