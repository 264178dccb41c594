"""The swapper: prepare may fail and then nothing has happened; commit flips everything and frees the rest."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_world import NUM_LAYERS, FakeKernel, World, swapper_of
from torch import Tensor

from morphserve.residence import AtOnce, HostResidence, RankTransition
from quant_layers import (
    LinearImpl,
    LinearSlot,
    StoreError,
    SwapError,
    TensorSlot,
    VariantStore,
    trim,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_nothing_changes_before_commit(world: World) -> None:
    """Guards against a forward pass that meets half a transition."""
    before, resident = world.impls(), world.swapper.resident_bytes
    world.swapper.prepare({0: "w8", 2: "w4"})
    assert world.swapper.staging_bytes > 0
    assert (world.impls(), world.swapper.resident_bytes) == (before, resident)
    assert world.swapper.formats() == dict.fromkeys(range(3), "base")
    world.swapper.commit()
    assert world.swapper.formats() == {0: "w8", 1: "base", 2: "w4"}
    assert world.swapper.staging_bytes > 0, "a step under way may read what was replaced"
    world.swapper.reclaim()
    assert world.swapper.staging_bytes == 0
    with pytest.raises(SwapError, match="nothing is prepared"):
        world.swapper.commit()
    changed = [old != new for old, new in zip(before, world.impls(), strict=True)]
    assert changed == [True, True, False, False, True, True]


def test_bytes_are_those_of_the_formats_in_use(world: World) -> None:
    """Guards against a ledger that drifts from what the linears really hold."""
    by_format = {f: [world.store.nbytes(layer, f) for layer in range(NUM_LAYERS)] for f in ("base", "w8", "w4")}
    world.switch({0: "w8", 2: "w4"})
    assert world.swapper.resident_bytes == by_format["w8"][0] + by_format["base"][1] + by_format["w4"][2]
    world.swapper.prepare({0: "base"})
    assert world.swapper.staging_bytes == by_format["base"][0]


def test_the_base_comes_back_byte_identical(world: World) -> None:
    """Guards against a restore that loses a bit: level 0 must be the stock model."""
    before = world.base_digest()
    everything = range(NUM_LAYERS)
    for format in ("w8", "w4"):
        world.switch(dict.fromkeys(everything, format))
        assert world.base_digest() != before
    world.switch(dict.fromkeys(everything, "base"))
    assert world.base_digest() == before


def test_a_variant_keeps_the_bias_and_stays_near_the_base(world: World) -> None:
    """Guards against a swap to another layer's variant, or one that drops the bias."""
    x = torch.randn(5, 64)
    slot = world.slots[1]["self_attn.qkv_proj"]
    expected = slot.impl(x)
    world.switch({1: "w8"})
    assert (slot.impl(x) - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("fail_at", range(1, 2 * NUM_LAYERS + 1))
def test_a_failure_at_any_linear_leaves_everything_as_it_was(world: World, fail_at: int) -> None:
    """Guards against a half-prepared state that a later commit would put in use."""
    world.switch({0: "w4"})
    before, formats, resident = world.impls(), world.swapper.formats(), world.swapper.resident_bytes
    world.kernels["w8"].fail_at = fail_at
    with pytest.raises(MemoryError):
        world.swapper.prepare(dict.fromkeys(range(NUM_LAYERS), "w8"))
    assert world.swapper.staging_bytes == 0
    assert (world.impls(), world.swapper.formats()) == (before, formats)
    assert world.swapper.resident_bytes == resident
    with pytest.raises(SwapError, match="nothing is prepared"):
        world.swapper.commit()
    world.kernels["w8"].fail_at = -1
    world.switch(dict.fromkeys(range(NUM_LAYERS), "w8"))  # and the next attempt works
    assert set(world.swapper.formats().values()) == {"w8"}


def test_a_failed_prepare_holds_no_memory(world: World) -> None:
    """Guards: half a layer kept by the exception of a command, while blocks that were unmapped for it come back."""
    kernel, read = world.kernels["w8"], []
    build = kernel.build

    def noting(tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        read.extend(weakref.ref(tensor) for tensor in tensors.values())
        return build(tensors, bias)

    kernel.build = noting  # type: ignore[method-assign]
    kernel.fail_at = 2
    rank = RankTransition(world.swapper, SimpleNamespace(num_mapped=0), AtOnce())  # type: ignore[arg-type]
    gc.disable()
    try:
        rank.prepare({0: "w8"})
        assert read and not any(tensor() is not None for tensor in read)
        with pytest.raises(MemoryError, match="at this linear"):
            rank.outcome()
    finally:
        gc.enable()


def test_a_failing_base_rebuild_and_a_damaged_file_leave_the_variant_running(world: World) -> None:
    """Guards against losing a layer when the way back fails."""
    world.switch({0: "w8", 1: "w8"})
    before = world.impls()
    path = world.store.directory / world.store.entry(1, "base").file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=path.name):
        world.swapper.prepare({0: "base", 1: "base"})
    assert world.impls() == before and world.swapper.staging_bytes == 0


def test_abort_drops_the_staging_and_may_be_repeated(world: World) -> None:
    """Guards against an abort that fails because another rank's failure came first."""
    before = world.impls()
    world.swapper.abort()
    world.swapper.prepare({0: "w8"})
    world.swapper.abort()
    world.swapper.abort()
    assert world.impls() == before and world.swapper.staging_bytes == 0
    world.switch({0: "w8"})


def test_misuse_is_refused(world: World) -> None:
    """Guards against a second prepare that would leak the first, and against typos reaching the store."""
    with pytest.raises(SwapError, match=r"layer 7 is not morphable; morphable are \[0, 1, 2\]"):
        world.swapper.prepare({7: "w8"})
    with pytest.raises(SwapError, match="format 'w3' of its attention was not made"):
        world.swapper.prepare({0: "w3"})
    world.swapper.prepare({0: "w8"})
    with pytest.raises(SwapError, match="2 parts of layers are prepared already"):
        world.swapper.prepare({1: "w8"})
    world.swapper.commit()
    assert world.swapper.formats()[0] == "w8"


def test_a_change_to_the_present_format_builds_nothing(world: World) -> None:
    """Guards against paying for layers that already are what the plan asks for."""
    world.switch({0: "w8"})
    before, builds = world.impls(), world.kernels["w8"].builds
    world.swapper.prepare({0: "w8", 1: "base"})
    assert world.swapper.staging_bytes == 0
    world.swapper.commit()
    assert world.impls() == before and world.kernels["w8"].builds == builds


def test_a_cache_for_another_kernel_or_model_is_refused(world: World) -> None:
    """Guards against feeding one kernel's layout to another, which computes garbage without an error."""
    packed = {name: world.kernels["w8"].pack(t["weight"]) for name, t in world.base[0].items()}
    world.store.write(0, "w8", packed, kernel="other")
    world.switch({0: "w8"})
    world.switch({0: "base"})
    world.kernels["w8"].name = "new"
    with pytest.raises(StoreError, match="packed for kernel 'fake_w8', here runs 'new'"):
        world.swapper.prepare({0: "w8"})
    world.kernels["w8"].name = "fake_w8"
    world.store.write(0, "w8", {"self_attn.qkv_proj": packed["self_attn.qkv_proj"]}, kernel="fake_w8")
    with pytest.raises(StoreError, match=r"holds linears \[\], the model has \['mlp.down_proj'\]"):
        world.swapper.prepare({0: "w8"})


def test_swaps_go_on_after_the_cache_was_deleted(world: World) -> None:
    """Guards against a level that cannot be left: who cleans ~/.cache must not stop a running server's restores."""
    before = world.base_digest()
    world.store.verify()  # as every start does
    world.switch({0: "w4"})
    shutil.rmtree(world.store.directory)
    world.switch(dict.fromkeys(range(NUM_LAYERS), "w8"))
    assert set(world.swapper.formats().values()) == {"w8"} and world.base_digest() != before
    world.switch(dict.fromkeys(range(NUM_LAYERS), "base"))
    assert world.base_digest() == before


_plans = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, NUM_LAYERS - 1), st.sampled_from(("base", "w8", "w4")), max_size=NUM_LAYERS),
        st.sampled_from(("commit", "abort", "fail")),
    ),
    max_size=6,
)


@settings(max_examples=25)
@given(plans=_plans)
def test_any_script_of_transitions_ends_where_its_commits_say(
    plans: list[tuple[dict[int, str], str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Guards against state that leaks from an aborted or failed transition into a later one."""
    world = World(tmp_path_factory.mktemp("store"))
    before = world.base_digest()
    expected = dict.fromkeys(range(NUM_LAYERS), "base")
    for changes, outcome in plans:
        for kernel in world.kernels.values():
            kernel.builds, kernel.fail_at = 0, 1 if outcome == "fail" else -1
        fails = outcome == "fail" and any(f != "base" and expected[i] != f for i, f in changes.items())
        if fails:
            with pytest.raises(MemoryError):
                world.swapper.prepare(changes)
        else:
            world.swapper.prepare(changes)
            if outcome == "abort":
                world.swapper.abort()
            else:
                world.commit()
                expected |= changes
        assert world.swapper.formats() == expected
        assert world.swapper.staging_bytes == 0
        total = sum(world.store.nbytes(i, f) for i, f in expected.items())
        assert world.swapper.resident_bytes == total
    for kernel in world.kernels.values():
        kernel.fail_at = -1
    world.switch(dict.fromkeys(range(NUM_LAYERS), "base"))
    assert world.base_digest() == before


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


class _Held:
    """Holds tensors and nothing else, so that resident bytes are exactly theirs."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.nbytes = sum(t.nbytes for t in self.tensors.values())

    def __call__(self, x: Tensor) -> Tensor:
        return x


class _HoldingKernel(FakeKernel):
    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return _Held(tensors)


def test_freed_memory_returns_to_the_system_and_comes_back(tmp_path: Path) -> None:
    """Guards against freed weights that stay in the process: the KV cache could never have them."""
    layers, shape = 32, (1024, 1024)  # 64 MiB of base in 2 MiB pieces, 32 MiB as w8
    kernel = _HoldingKernel("w8")
    store = VariantStore.open(tmp_path, "fp", {"w8": kernel.name})
    for layer in range(layers):
        weight = torch.randn(shape).bfloat16()
        store.write(layer, "base", {"proj": {"weight": weight}})
        store.write(layer, "w8", {"proj": kernel.pack(weight)}, kernel.name)
    del weight
    with HostResidence().loading():  # as vLLM's own weights
        slots = {i: {"proj": LinearSlot("proj", _Held(store.read(i, "base")["proj"]))} for i in range(layers)}
    swapper = swapper_of(slots, store, {"w8": kernel}, lambda layer, name, tensors: _Held(tensors))
    trim()
    at_base, base_bytes = _anonymous_bytes(), swapper.resident_bytes
    tolerance = base_bytes // 10

    swapper.prepare(dict.fromkeys(range(layers), "w8"))
    assert abs(_anonymous_bytes() - at_base - swapper.staging_bytes) < tolerance
    swapper.commit()
    swapper.reclaim()
    freed = base_bytes - swapper.resident_bytes
    assert freed > base_bytes * 0.45
    assert abs(at_base - _anonymous_bytes() - freed) < tolerance

    swapper.prepare(dict.fromkeys(range(layers), "base"))
    swapper.abort()
    assert abs(at_base - _anonymous_bytes() - freed) < tolerance

    swapper.prepare(dict.fromkeys(range(layers), "base"))
    swapper.commit()
    swapper.reclaim()
    assert abs(_anonymous_bytes() - at_base) < tolerance


class _NormWorld(World):
    """The same, with a norm in each layer that the w8 variants of layers 0 and 1 bring values for."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.norms = {layer: torch.randn(8).bfloat16() for layer in self.slots}
        self.before = {layer: norm.clone() for layer, norm in self.norms.items()}
        self.brought = {layer: torch.randn(8).bfloat16() for layer in (0, 1)}
        for layer, norm in self.brought.items():
            packed = self.store.read(layer, "w8")
            self.store.write(layer, "w8", {**packed, "norm": {"weight": norm}}, "fake_w8")
        tensors = {layer: {"norm": TensorSlot(norm)} for layer, norm in self.norms.items()}
        self.swapper = swapper_of(self.slots, self.store, self.kernels, self.build_base, tensors)

    def expected(self, layer: int) -> Tensor:
        smoothed = self.swapper.formats()[layer] == "w8" and layer in self.brought
        return self.brought[layer] if smoothed else self.before[layer]


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["base", "w8", "w4"]), st.booleans()), max_size=8))
@settings(deadline=None, max_examples=30)
def test_norms_go_with_the_format(tmp_path_factory: pytest.TempPathFactory, moves: list) -> None:  # type: ignore[type-arg]
    """Guards: scaled weights behind an unscaled norm, or a norm that stays scaled after the restore."""
    world = _NormWorld(tmp_path_factory.mktemp("norms"))
    addresses = [norm.data_ptr() for norm in world.norms.values()]
    for layer, format, keeps in moves:
        world.swapper.prepare({layer: format})
        for other, norm in world.norms.items():
            assert torch.equal(norm, world.expected(other)), "changed before commit"
        if keeps:
            world.swapper.commit()
        else:
            world.swapper.abort()
        for other, norm in world.norms.items():
            assert torch.equal(norm, world.expected(other))
    assert addresses == [norm.data_ptr() for norm in world.norms.values()]
    world.switch(dict.fromkeys(range(3), "base"))
    assert all(torch.equal(norm, world.before[layer]) for layer, norm in world.norms.items())


def test_a_prepare_that_fails_leaves_the_norms(tmp_path: Path) -> None:
    """Guards: norms of the layers that were staged before the one that failed."""
    world = _NormWorld(tmp_path)
    world.kernels["w8"].fail_at = world.kernels["w8"].builds + 3  # in layer 1
    with pytest.raises(MemoryError):
        world.swapper.prepare({0: "w8", 1: "w8"})
    assert all(torch.equal(norm, world.before[layer]) for layer, norm in world.norms.items())
    with pytest.raises(SwapError, match="nothing is prepared"):
        world.swapper.commit()
