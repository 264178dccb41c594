"""The order of a device's work: no page goes before the steps that read it are done, whoever waits, whenever.

On the stub driver, where a step that is queued touches all that is mapped, and nothing is done before somebody waits
for it. Steps touch no layer that is staged and not yet committed, and nothing that a commit gives up and comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import pytest
from cpu.cuda_stub import FakeStream, StubDriver
from cpu.device_world import BASE_BLOCKS, GRANULARITY, NUM_LAYERS, PAGE_BYTES, DeviceWorld
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_resize import BackingError
from quant_layers import BASE, Part, SwapError

pytestmark = pytest.mark.cpu

FORMATS = (BASE, "w8", "fp8", "w8/base", "base/fp8", "fp8/w8")


class OrderedWorld(DeviceWorld):
    """One whose steps are work of a stream, ended by waits alone."""

    def __init__(self) -> None:
        self.driver = StubDriver(1000 * PAGE_BYTES, PAGE_BYTES)
        self.stream = FakeStream()
        super().__init__(allocator=self.driver.allocator([self.stream]))
        load = self.arena.load

        def stage(parts: list[Part]) -> None:
            load(parts)
            self._each(self.driver.withdraw, parts)

        self.arena.load = stage  # type: ignore[method-assign]

    def step(self) -> None:
        """Queue a forward pass."""
        self.stream.num_queued += 1

    def commit(self, has_layers: bool, num_kv_blocks: int) -> None:
        """Commit as between two steps; no later one touches what goes."""
        before = self._live_parts()
        if num_kv_blocks < self.cache.num_mapped:
            start = self.cache.buffer.data_ptr()
            for first, end in self.cache.geometry.release_ranges(num_kv_blocks, self.cache.num_mapped):
                self.driver.withdraw(self._address_of(start) + first, end - first)

        def switched() -> None:
            self._each(self.driver.withdraw, before - self._live_parts())
            self._each(self.driver.publish, self._live_parts() - before)

        self.rank.commit(has_layers, num_kv_blocks, switched)

    def _live_parts(self) -> set[Part]:
        return {part for part, _ in self.swapper._live.values()}

    def _each(self, tell: Callable[[int, int], None], parts: Iterable[Part]) -> None:
        for part in parts:
            image = self.arena._images[part]
            tell(image.arena._address, image.pages[1])

    def _address_of(self, start: int) -> int:
        assert start == self.backing.buffer.data_ptr()
        return self.backing._address

    def settle(self) -> None:
        """Let the background thread do what there is, while steps go on."""
        self.driver.while_waiting = self.step
        self.later.run()


def is_over(world: OrderedWorld) -> bool:
    try:
        return not world.rank.outcome()
    except (BackingError, SwapError):
        return True


@settings(max_examples=150, deadline=None)
@given(
    commands=st.lists(
        st.tuples(
            st.sampled_from(("prepare", "commit", "shrink", "abort", "kv", "background")),
            st.integers(0, NUM_LAYERS - 1),
            st.sampled_from(FORMATS),
            st.integers(1, 6),
        ),
        max_size=30,
    )
)
def test_no_page_goes_under_a_step(commands: list[tuple[str, int, str, int]]) -> None:
    """Guards: weights or KV blocks unmapped while a queued step still reads them, in any order of commands, with steps
    queued before, between and beside them."""
    world = OrderedWorld()
    for command, layer, fmt, granularities in commands:
        world.step()
        if command == "prepare":
            world.settle()
            world.rank.prepare({layer: fmt})
        elif command in ("commit", "shrink") and is_over(world):
            num_blocks = world.cache.num_mapped if command == "commit" else GRANULARITY
            try:
                world.commit(True, num_blocks)
            except SwapError as e:
                assert "nothing is prepared" in str(e)
        elif command == "abort":
            world.rank.abort()
        elif command == "kv" and is_over(world):
            world.commit(False, granularities * GRANULARITY)
        elif command == "background":
            world.settle()
        world.step()
    world.settle()
    assert is_over(world)
    world.check_books()


def early(world: OrderedWorld) -> Callable[[], Any]:
    """Note what is queued when the level is prepared, not when it is committed."""
    fence = world.allocator.fence()
    return lambda: fence


def none(world: OrderedWorld) -> Callable[[], Any]:
    """Wait for nothing."""
    world.allocator._wait = lambda: None
    return nullcontext


@pytest.mark.parametrize("fault", [early, none])
@pytest.mark.parametrize("what", ["layers", "blocks"])
def test_the_stub_sees_pages_that_go_too_early(fault: Callable[[OrderedWorld], Callable[[], Any]], what: str) -> None:
    """Guards: a check of order that passes on whatever order there is."""
    for planted in (False, True):
        world = OrderedWorld()
        world.step()
        if planted:
            world.rank._fence = fault(world)
        world.rank.prepare({0: "w8"} if what == "layers" else {})
        world.settle()
        world.driver.while_waiting = lambda: None
        world.step()
        world.commit(what == "layers", BASE_BLOCKS if what == "layers" else GRANULARITY)
        world.step()
        world.later.run()
        if planted:
            with pytest.raises(AssertionError, match="unmapped under queued work"):
                world.rank.outcome()
        else:
            assert not world.rank.outcome()


def test_the_wait_is_not_for_steps_that_come_later() -> None:
    """Guards: a level that waits for each step that was queued while it waited."""
    world = OrderedWorld()
    world.step()
    world.rank.prepare({0: "w8", 1: "w8"})
    world.settle()
    queued = world.stream.num_queued
    world.commit(True, BASE_BLOCKS)
    world.stream.num_queued += 50
    world.driver.while_waiting = lambda: None
    world.later.run()
    assert not world.rank.outcome() and world.stream.num_done == queued
