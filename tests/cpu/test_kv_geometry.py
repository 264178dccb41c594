"""Byte arithmetic of kv_resize.geometry against a byte-by-byte model."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_resize import KVGeometry, Placement, Run
from kv_resize.geometry import ByteRange, total
from tests.kv_layouts import block_outermost


@st.composite
def geometries(draw: st.DrawFn) -> KVGeometry:
    """Small caches with any alignment: gaps, several blocks per page, several pages per block."""
    max_num_blocks = draw(st.integers(2, 7))
    runs, end = [], 0
    for _ in range(draw(st.integers(1, 4))):
        offset = end + draw(st.sampled_from([0, 0, 1, 5]))
        stride = draw(st.integers(1, 20))
        runs.append(Run(offset, stride))
        end = offset + stride * max_num_blocks
    size_bytes = end + draw(st.sampled_from([0, 3]))
    return KVGeometry(tuple(runs), max_num_blocks, size_bytes, page_bytes=draw(st.integers(1, 9)))


def owners(g: KVGeometry) -> list[tuple[int, int] | None]:
    """For each byte of the buffer the (run, block) it belongs to."""
    owner: list[tuple[int, int] | None] = [None] * g.size_bytes
    for i, run in enumerate(g.runs):
        for b in range(g.max_num_blocks):
            for k in range(run.block_stride):
                owner[run.offset + b * run.block_stride + k] = (i, b)
    return owner


def page_set(ranges: list[ByteRange], page: int) -> set[int]:
    assert all(a % page == 0 and b % page == 0 and a < b for a, b in ranges)
    assert all(before[1] <= after[0] for before, after in pairwise(ranges))  # or bytes count twice
    return {p for a, b in ranges for p in range(a // page, b // page)}


def byte_set(ranges: list[ByteRange]) -> set[int]:
    return {i for a, b in ranges for i in range(a, b)}


@given(geometries(), st.data())
def test_ranges_match_the_byte_model(g: KVGeometry, data: st.DataObject) -> None:
    """Guards against releasing a page with a live byte, leaking a dead page, or missing a byte."""
    first = data.draw(st.integers(1, g.max_num_blocks))
    end = data.draw(st.integers(first, g.max_num_blocks))
    owner, page = owners(g), g.page_bytes
    inside = {i for i, o in enumerate(owner) if o is not None and first <= o[1] < end}

    exact = g.byte_ranges(first, end)
    assert byte_set(exact) == inside
    assert total(exact) == len(inside)
    assert page_set(g.populate_ranges(first, end), page) == {i // page for i in inside}

    releasable = set()
    for p in {i // page for i in inside}:
        content = owner[p * page : (p + 1) * page]
        run = next(o[0] for o in content if o is not None and first <= o[1] < end)
        if all(o is not None and o[0] == run and o[1] >= first for o in content):
            releasable.add(p)
    assert page_set(g.release_ranges(first, end), page) == releasable


@given(geometries(), st.data())
def test_fringe_covers_every_byte_that_may_be_stale(g: KVGeometry, data: st.DataObject) -> None:
    """Guards against a new block that shows bytes its page kept from an earlier life."""
    first = data.draw(st.integers(1, g.max_num_blocks))
    end = data.draw(st.integers(first, g.max_num_blocks))
    inside = byte_set(g.byte_ranges(first, end))
    fringe = byte_set(g.fringe_ranges(first, end))
    assert fringe <= inside
    # Whatever pages were ever released hold nothing: only pages no release can name may be stale.
    released = byte_set(g.release_ranges(first, g.max_num_blocks))
    assert inside - released <= fringe


def test_layouts_of_the_demo_model() -> None:
    """Guards against a wrong stride for the layouts vLLM uses: 30 layers, 24,576 B per block and layer."""
    layer = KVGeometry.layer_outermost(30, 24_576, 192, 4096)
    block = block_outermost(30, 24_576, 192, 4096)
    assert layer.block_bytes == block.block_bytes == 737_280
    assert layer.size_bytes == block.size_bytes == 192 * 737_280
    assert layer.runs[1] == Run(192 * 24_576, 24_576)
    assert block.runs == (Run(0, 737_280),)
    assert layer.release_ranges(49, 192)[0] == (49 * 24_576, 192 * 24_576)
    assert block.release_ranges(49, 192) == [(49 * 737_280, 192 * 737_280)]


def test_several_tensors_of_one_buffer() -> None:
    """Guards against counting a packed block once per tensor, or losing the second tensor."""
    packed = [Placement(2, 100, 500, offset=0), Placement(3, 100, 500, offset=200)]
    assert KVGeometry.from_placements(packed, 4, 2000, 1).runs == (Run(0, 500),)
    regions = [Placement(2, 400, 100, offset=0), Placement(1, 1200, 300, offset=800)]
    assert KVGeometry.from_placements(regions, 4, 2000, 1).runs == (Run(0, 100), Run(400, 100), Run(800, 300))


@pytest.mark.parametrize(
    ("placements", "size"),
    [
        ([Placement(2, 50, 60)], 10_000),  # neither layout: layers and blocks interleave by parts
        ([Placement(2, 400, 100), Placement(1, 400, 100, offset=700)], 10_000),  # overlap
        ([Placement(2, 400, 100)], 799),  # does not fit
    ],
)
def test_impossible_placements_are_refused(placements: list[Placement], size: int) -> None:
    """Guards against a cache that would release another layer's memory."""
    with pytest.raises(ValueError, match="block-outermost|overlaps|the buffer has"):
        KVGeometry.from_placements(placements, 4, size, 1)


def test_block_ranges_outside_the_cache_are_refused() -> None:
    """Guards against a resize past the reservation silently touching the next layer."""
    g = KVGeometry.layer_outermost(2, 10, 4, 1)
    for first, end in ((0, 5), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="ascending range"):
            g.byte_ranges(first, end)
