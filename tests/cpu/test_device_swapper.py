"""Layers and KV blocks that take pages from one another beside forward passes; every call of the driver fails once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from cpu.device_world import BASE_BLOCKS, GRANULARITY, NUM_LAYERS, PAGE_BYTES, DeviceWorld, WorldKV
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_resize import BackingError
from morphserve.residence import Layout, RankSizes, RankTransition, page_size
from quant_layers import BASE, Part, SwapError

pytestmark = pytest.mark.cpu

LEVEL0 = [BASE] * NUM_LAYERS


def is_pending(world: DeviceWorld) -> bool:
    """Of the last command, however it ends."""
    try:
        return world.rank.outcome()
    except (BackingError, SwapError):
        return False


def test_layers_go_and_come_back_bit_identical() -> None:
    """Guards rule 3: a restore that loses a bit, a page that is not the part's own, a norm that stays behind."""
    world = DeviceWorld()
    world.check_forward(LEVEL0)
    addresses = [slot.impl._weight.data_ptr() for slots in world.slots.values() for slot in slots.values()]
    for formats in (["w8", BASE, BASE], ["w8", "fp8", "w8"], ["fp8", "w8/base", "base/fp8"], LEVEL0):
        for layer, fmt in enumerate(formats):
            world.switch({layer: fmt})
        world.check_forward(formats)
        world.check_books()
    assert addresses == [slot.impl._weight.data_ptr() for slots in world.slots.values() for slot in slots.values()]


def test_nothing_changes_before_commit_and_pages_wait_for_the_steps_under_way() -> None:
    """Guards: a step that meets half a transition, or whose weights are unmapped under it."""
    world = DeviceWorld()
    world.forward()
    world.rank.prepare({0: "w8", 1: "fp8/base"})
    assert world.rank.outcome() and world.swapper.staging_bytes == 0, "work in the step thread"
    world.later.run()
    assert not world.rank.outcome() and world.swapper.staging_bytes > 0
    world.check_forward(LEVEL0)
    switched = []
    world.rank.commit(True, BASE_BLOCKS, lambda: switched.append(world.formats()))
    assert switched == [["w8", "fp8/base", BASE]], "graphs are to change in the same call as the layers"
    assert world.rank.outcome() and world.swapper.staging_bytes > 0, "pages of steps under way have gone"
    world.check_forward(["w8", "fp8/base", BASE])
    world.check_books()
    world.later.run()  # the fake refuses to unmap what queued work reads: reclaim waits
    world.rank.outcome()
    assert world.swapper.staging_bytes == 0
    world.check_forward(["w8", "fp8/base", BASE])
    world.check_books()


def test_a_level_waits_once_for_the_steps_before_it() -> None:
    """Guards: half layers that wait one after the other, each for the step that was queued last; a wait for steps that
    came after the level changed; pages that go before the steps that still read them are done."""
    world = DeviceWorld(spare_pages=60)
    waits: list[bool] = []  # each: behind the fence
    put: list[list[str]] = []  # formats at each fence
    behind = [False]

    @contextmanager
    def hold() -> Iterator[None]:
        behind[0] = True
        yield
        behind[0] = False

    def fence() -> AbstractContextManager[None]:
        put.append(world.formats())
        return hold()

    world.allocator.wait = lambda: waits.append(behind[0])  # type: ignore[method-assign]
    world.rank = RankTransition(world.swapper, WorldKV(world.cache), world.later, fence=fence)
    world.rank.prepare({0: "w8", 1: "w8"})
    world.later.run()
    world.rank.commit(True, BASE_BLOCKS + GRANULARITY)
    assert put == [["w8", "w8", BASE]] and not waits, "put up between two steps, where nobody waits"
    world.later.run()
    assert waits == [True] * 4, "one for each half of a layer that goes, all for the same steps"
    assert world.cache.num_mapped == BASE_BLOCKS + GRANULARITY and not behind[0]


def test_what_layers_free_becomes_blocks() -> None:
    """Guards: growth by less than the freed pages, blocks that are not clear, pages that do not come back."""
    staging = sum(DeviceWorld().arena.num_bytes(Part(0, half, "w8")) for half in ("attention", "mlp")) // PAGE_BYTES
    world = DeviceWorld(spare_pages=staging)
    free, before = world.pool.num_free, world.swapper.resident_bytes
    freed = before // PAGE_BYTES // NUM_LAYERS - staging
    grown = BASE_BLOCKS + freed // NUM_LAYERS * GRANULARITY
    assert grown > BASE_BLOCKS and freed < staging * NUM_LAYERS
    world.switch({0: "w8"}, grown)
    assert (before - world.swapper.resident_bytes) // PAGE_BYTES == freed
    assert world.cache.num_mapped == grown and world.pool.num_free == free + freed % NUM_LAYERS
    assert not world.cache.buffer[BASE_BLOCKS * 256 : grown * 256].any(), "bytes of weights in a new block"
    world.rank.commit(False, BASE_BLOCKS)
    world.later.run()
    world.switch({0: BASE})
    assert world.pool.num_free == free and world.cache.num_mapped == BASE_BLOCKS
    world.check_forward(LEVEL0)
    world.check_books()


def test_too_few_pages_change_nothing() -> None:
    """Guards: a swap batch larger than the staging reserve takes the server down instead of being refused."""
    world = DeviceWorld(spare_pages=4)
    world.rank.prepare({0: "w8", 1: "w8"})
    world.later.run()
    for _ in range(2):
        with pytest.raises(BackingError, match=r"\d+ pages of 1,024 B wanted, \d+ are free"):
            world.rank.outcome()
    world.check_forward(LEVEL0)
    world.check_books()
    with pytest.raises(SwapError, match="nothing is prepared"):
        world.rank.commit(True, BASE_BLOCKS)


def test_a_kernel_that_refuses_leaves_nothing_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards promise 2 where the pages are there and the linear cannot be made of them."""
    world = DeviceWorld()
    broken = iter([None, None, RuntimeError("no such layout")])

    def build(*arguments: object) -> object:
        if (error := next(broken)) is not None:
            raise error
        return make(*arguments)  # type: ignore[arg-type]

    make = world.parts._build
    monkeypatch.setattr(world.parts, "_build", build)
    world.rank.prepare({0: "w8"})
    world.later.run()
    with pytest.raises(RuntimeError, match="no such layout"):
        world.rank.outcome()
    world.check_forward(LEVEL0)
    world.check_books()
    monkeypatch.undo()
    world.switch({0: "w8"})
    world.check_forward(["w8", BASE, BASE])


def test_requests_that_make_no_sense() -> None:
    """Guards: an unknown layer or format, or a second prepare, that costs a page or a level."""
    world = DeviceWorld()
    for changes, words in (
        ({7: "w8"}, r"layer 7 is not morphable; .* \[0, 1, 2\]"),
        ({0: "w3"}, "'w3' of its attention was not made"),
    ):
        with pytest.raises(SwapError, match=words):
            world.swapper.prepare(changes)
        world.check_books()
    world.swapper.prepare({0: "w8"})
    with pytest.raises(SwapError, match="2 parts of layers are prepared already"):
        world.swapper.prepare({1: "w8"})
    world.swapper.abort()
    world.swapper.abort()
    world.check_forward(LEVEL0)
    world.check_books()


def test_an_abort_that_never_came() -> None:
    """Guards: pages of a plan that its engine has forgotten, or the wrong layers switched by the next one."""
    world = DeviceWorld()
    world.rank.prepare({0: "w8"})
    world.rank.prepare({1: "fp8"})
    world.later.run()
    world.rank.outcome()
    world.rank.commit(True, BASE_BLOCKS)
    world.later.run()
    world.check_forward([BASE, "fp8", BASE])
    world.check_books()


def test_copies_of_blocks_need_no_background() -> None:
    """Guards: each swap batch of a drain waits for a thread, or is told of a failure that an earlier command had."""
    world = DeviceWorld(spare_pages=0)
    world.rank.prepare({0: "w8"})
    world.later.run()
    with pytest.raises(BackingError):
        world.rank.outcome()
    world.rank.commit(False, BASE_BLOCKS)
    assert not world.rank.outcome()


def test_nothing_is_done_before_the_device_has_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: blocks published before they are clear, layers switched before their bytes or a kernel's own tensors
    are there. The thread's work is queued on the device; only `finish` waits for it."""
    world = DeviceWorld()
    queued: list[str] = []

    def spy(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: object) -> object:
            queued.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, name, call)

    spy(world.copier, "copy")
    spy(world.parts, "_build")
    spy(world.cache, "map_at_most")
    monkeypatch.setattr(world.rank, "_finish", queued.clear)
    world.rank.prepare({0: "w8"})
    world.later.run()
    assert not queued
    world.rank.commit(True, BASE_BLOCKS + GRANULARITY)
    world.later.run()
    assert not queued and world.cache.num_mapped == BASE_BLOCKS + GRANULARITY


@pytest.mark.parametrize("call", range(48))
def test_any_call_of_the_driver_may_fail(call: int) -> None:
    """Guards rule 6: a refused call loses a page, a bit, or the old level."""
    world = DeviceWorld()
    world.forward()
    world.allocator.fail_at = world.allocator.num_calls + call
    world.rank.prepare({0: "w8", 2: "base/fp8"})
    world.later.run()
    formats = LEVEL0
    try:
        world.rank.outcome()
    except BackingError as e:
        assert "failed, as planned" in str(e)
        world.check_books()  # a page of what came before the failure stayed where nobody looks for it
    else:
        formats = ["w8", BASE, "base/fp8"]
        world.rank.commit(True, BASE_BLOCKS + GRANULARITY)
        world.later.run()
    failed = world.allocator.num_calls > (world.allocator.fail_at or 0)
    world.allocator.fail_at = None
    world.check_forward(formats)
    mapped = sorted(world.allocator.mapped.values())
    assert sorted([*mapped, *world.pool._free]) == list(range(1, world.allocator.num_created + 1)), "a page is lost"
    assert world.cache.num_mapped in (BASE_BLOCKS, BASE_BLOCKS + GRANULARITY)
    assert failed, "the failure never came: there are fewer calls than this"
    # What one failure left behind must not keep the next transition from working.
    world.rank.commit(False, BASE_BLOCKS)
    world.later.run()
    world.switch({layer: BASE for layer in range(NUM_LAYERS)})
    world.check_forward(LEVEL0)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(("prepare", "commit", "abort", "grow", "background", "forward")),
            st.integers(0, NUM_LAYERS - 1),
            st.sampled_from((BASE, "w8", "fp8", "w8/base", "base/fp8", "fp8/w8")),
            st.integers(1, 12),
        ),
        max_size=30,
    )
)
def test_any_order_of_commands(steps: list[tuple[str, int, str, int]]) -> None:
    """Guards promises 1 to 3 of `RankTransition`, whatever an engine asks for between two steps."""
    world = DeviceWorld()
    formats, wanted = list(LEVEL0), dict[int, str]()
    for command, layer, fmt, granularities in steps:
        if command == "prepare":
            world.later.run()
            world.rank.prepare({layer: fmt})
            wanted = {layer: fmt}
        elif command == "commit" and not is_pending(world):
            try:
                world.rank.commit(True, world.cache.num_mapped)
            except SwapError as e:
                assert "nothing is prepared" in str(e)
            else:
                for index, new in wanted.items():
                    formats[index] = new
        elif command == "abort":
            world.rank.abort()
        elif command == "grow" and not is_pending(world):
            world.rank.commit(False, granularities * GRANULARITY)
        elif command == "background":
            world.later.run()
        world.check_forward(formats)
        world.check_books()
    world.later.run()
    world.check_forward(formats)
    world.check_books()


@pytest.mark.parametrize(
    ("num_layers", "layer_mib", "block_kib", "device_gib", "page_mib"),
    [
        (32, 416, 64, 79, 8), (80, 408, 16, 79, 4), (32, 416, 64, 22, 2), (8, 33, 64, 79, 2), (1, 4096, 64, 139, 8),
        (200, 1, 64, 8, 2), (40, 680, 80, 79, 2),  # ten KV heads: five pages of 2 MiB a layer, 400 MiB in all
    ],
)  # fmt: skip
def test_a_page_is_little_of_a_layer_and_of_the_device(
    num_layers: int, layer_mib: int, block_kib: int, device_gib: int, page_mib: int
) -> None:
    """Guards: a call of the driver for every 2 MiB where it moves 32 in the same time; a small model whose layers are
    rounded up to twice their size, or whose blocks come and go by a tenth of the device."""
    sizes = RankSizes(num_layers, layer_mib << 20, block_kib << 10)
    assert page_size(sizes, device_gib << 30) == page_mib << 20


def test_a_layout_is_aligned_and_whole() -> None:
    """Guards: tensors that overlap, or that a kernel may not read because of where they begin."""
    a = {"weight": torch.arange(7, dtype=torch.int8), "scale": torch.rand(3)}
    tensors = {"a": a, "b": {"weight": torch.rand(2, 5)}}
    layout = Layout.of(tensors)
    memory = torch.full((layout.size_bytes,), 0x55, dtype=torch.int8)
    layout.fill(memory, tensors)
    for linear, parts in layout.views(memory).items():
        for name, view in parts.items():
            assert torch.equal(view, tensors[linear][name])
            assert (view.data_ptr() - memory.data_ptr()) % 256 == 0
    ends = sorted((p.offset, p.offset + p.num_bytes) for parts in layout.places.values() for p in parts.values())
    assert all(end <= start for (_, end), (start, _) in zip(ends, ends[1:], strict=False))
    assert ends[-1][1] == layout.size_bytes


def test_a_part_is_counted_in_whole_pages() -> None:
    """Guards: a ledger in bytes of tensors, which pages never add up to."""
    world = DeviceWorld()
    for fmt in (BASE, "w8", "fp8"):
        for half in ("attention", "mlp"):
            part = Part(0, half, fmt)
            tensors = sum(t.nbytes for parts in world.arena.tensors(part).values() for t in parts.values())
            assert world.arena.num_bytes(part) % PAGE_BYTES == 0
            assert tensors <= world.arena.num_bytes(part) < tensors + PAGE_BYTES + 8 * 256
