"""Attention and MLP of a layer change one without the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quant_world import NUM_LAYERS, World, swapper_of

from quant_layers import StoreError, SwapError, TensorSlot

pytestmark = pytest.mark.cpu


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_only_the_half_that_changes_is_built(world: World) -> None:
    """Guards: a pause for a half that stays as it is, or a half in the other one's format."""
    slots = world.slots[1]
    world.switch({1: "w8/base"})
    assert (slots["self_attn.qkv_proj"].format, slots["mlp.down_proj"].format) == ("w8", "base")
    assert world.swapper.formats() == {0: "base", 1: "w8/base", 2: "base"}
    attention = slots["self_attn.qkv_proj"].impl
    world.switch({1: "w8/w4"})
    assert slots["self_attn.qkv_proj"].impl is attention and slots["mlp.down_proj"].format == "w4"
    assert world.swapper.formats()[1] == "w8/w4"
    world.switch({1: "w8"})
    assert slots["self_attn.qkv_proj"].impl is attention and world.swapper.formats()[1] == "w8"


def test_bytes_of_halves(world: World) -> None:
    """Guards: a ledger that counts a whole layer where half of it was swapped."""
    sizes = {fmt: world.store.entry(0, fmt).sizes for fmt in ("base", "w8", "w4")}
    before = world.swapper.resident_bytes
    world.switch({0: "w4/w8"})
    gained = sum(sizes["base"].values()) - sizes["w4"]["self_attn.qkv_proj"] - sizes["w8"]["mlp.down_proj"]
    assert before - world.swapper.resident_bytes == gained


def test_restoring_half_by_half_is_byte_identical(world: World) -> None:
    """Guards: a base that lost a bit on the way."""
    before = world.base_digest()
    everything = range(NUM_LAYERS)
    for formats in ("w8/w4", "base/w4", "base"):
        world.switch(dict.fromkeys(everything, formats))
    assert world.base_digest() == before


def test_norms_go_with_their_half(tmp_path: Path) -> None:
    """Guards: the norm in front of an attention that stayed as it was changed with the MLP."""
    world = World(tmp_path)
    tensors = {0: {"input_layernorm": TensorSlot(torch.ones(4)), "post_attention_layernorm": TensorSlot(torch.ones(4))}}
    stored = {name: world.kernels["w8"].pack(parts["weight"]) for name, parts in world.base[0].items()}
    brought = {"input_layernorm": {"weight": torch.full((4,), 2.0)},
               "post_attention_layernorm": {"weight": torch.full((4,), 3.0)}}  # fmt: skip
    world.store.write(0, "w8", stored | brought, "fake_w8")
    swapper = swapper_of(world.slots, world.store, world.kernels, world.build_base, tensors)

    def live() -> list[float]:
        return [float(slot.live[0]) for slot in tensors[0].values()]

    for formats, expected in (("base/w8", [1, 3]), ("w8", [2, 3]), ("w8/w4", [2, 1]), ("base", [1, 1])):
        swapper.prepare({0: formats})
        swapper.commit()
        assert live() == expected, formats


def test_what_is_not_known_is_refused(world: World) -> None:
    """Guards: a half in no format at all."""
    with pytest.raises(SwapError, match="format 'w3' of its mlp was not made"):
        world.swapper.prepare({0: "w8/w3"})
    with pytest.raises(StoreError, match="has no"):
        world.store.entry(9, "w8")
    with pytest.raises(SwapError, match="nothing is prepared"):
        world.swapper.commit()
