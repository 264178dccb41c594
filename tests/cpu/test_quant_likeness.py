"""A format that computes something else than the model is found before it serves, and a good one never is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from quant_world import NUM_LAYERS, World, swapper_of
from torch import Tensor

from quant_layers import FirstLook, HalfLayer, KernelError, apply_scales, folds_of, quantize_w4, quantize_w8

SHAPES = {
    "self_attn.qkv_proj": (96, 64),  # 64 of queries, 16 of keys, 16 of values
    "self_attn.o_proj": (64, 64),
    "mlp.gate_up_proj": (256, 64),
    "mlp.down_proj": (64, 128),
}
WIDTHS = {name: k for name, (_, k) in SHAPES.items()}
ATTENTION = ("self_attn.qkv_proj", "self_attn.o_proj")
MLP = ("mlp.gate_up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


class _Dense:
    nbytes = 0

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.float(), self.weight.float())


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def norms(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return {name: 0.1 + torch.rand(64, generator=generator) for name in NORMS}


def half(names: tuple[str, ...], of: Mapping[str, Tensor], norm: Mapping[str, Tensor]) -> HalfLayer:
    return HalfLayer({name: _Dense(of[name]) for name in names}, norm)


def look(widths: Mapping[str, int] = WIDTHS, offset: float = 0.0) -> FirstLook:
    return FirstLook(widths, torch.float32, offset, "do this")


def rounded(of: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    quantize = quantize_w8 if bits == 8 else lambda weight: quantize_w4(weight, 32)
    return {name: quantize(weight).dequantize() for name, weight in of.items()}


@pytest.mark.parametrize("names", [ATTENTION, MLP, ATTENTION + MLP])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_pass(names: tuple[str, ...], bits: int) -> None:
    """Guards: a format refused for the rounding that it is."""
    look()(0, f"w{bits}", half(names, rounded(weights(), bits), norms()), half(names, weights(), norms()))


@pytest.mark.parametrize("bad", SHAPES)
@pytest.mark.parametrize("how", ["another layer's", "rows moved", "not a number"])
def test_garbage_is_found_wherever_it_is(bad: str, how: str) -> None:
    """Guards: one linear of a layer that nobody looks at."""
    names = ATTENTION if bad in ATTENTION else MLP
    broken = weights()
    broken[bad] = {
        "another layer's": weights(1)[bad],
        "rows moved": broken[bad].roll(7, dims=0),
        "not a number": torch.full_like(broken[bad], torch.nan),
    }[how]
    with pytest.raises(KernelError, match=r"layer 3: .* in w4 compute something else .*at least 0.8\); do this"):
        look()(3, "w4", half(names, broken, norms()), half(names, weights(), norms()))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_what_a_fold_moves_from_one_tensor_to_another_passes(offset: float) -> None:
    """Guards: a smoothed variant refused, because its linears alone are not the model's."""
    base, before = weights(), norms()
    generator = torch.Generator().manual_seed(9)
    folds = folds_of({*base, *before})
    assert {fold.how for fold in folds} == {"norm", "upper_rows"}
    scales = {fold.consumer: 10 ** (2 * torch.rand(WIDTHS[fold.consumer], generator=generator)) for fold in folds}
    smoothed, changed = apply_scales(base, before, offset, scales)
    after = {**before, **changed}
    for names in (ATTENTION, MLP):
        look(offset=offset)(0, "w8", half(names, smoothed, after), half(names, base, before))
        with pytest.raises(KernelError):  # the linears without their norms, or gate_up without its down
            look(offset=offset)(0, "w8", half(names, smoothed, before), half(names, base, before))


def test_widths_that_tell_nothing_of_what_feeds_what() -> None:
    """Guards: a model with another attention or MLP that cannot start, or whose linears are looked at in part."""
    shapes = {"self_attn.qkv_proj": (97, 64), "self_attn.o_proj": (64, 60), "mlp.gate_up_proj": (200, 64),
              "mlp.down_proj": (64, 90), "other": (8, 16)}  # fmt: skip
    of = {name: torch.randn(shape) for name, shape in shapes.items()}
    widths, names = {name: shape[1] for name, shape in shapes.items()}, tuple(shapes)
    look(widths)(0, "w4", half(names, rounded(of, 8), {}), half(names, of, {}))
    for bad in names:
        with pytest.raises(KernelError):
            broken = {**of, bad: -of[bad]}
            look(widths)(0, "w4", half(names, broken, {}), half(names, of, {}))


def test_one_look_a_format_and_none_at_the_base() -> None:
    """Guards: a cost for each swap; a way back to the base that a variant at fault would close."""
    one = look()
    bad, good = half(MLP, weights(1), norms()), half(MLP, weights(), norms())
    one(0, "base", good, bad)
    one(0, "w8", good, good)
    one(1, "w8", bad, good)  # not looked at any more
    with pytest.raises(KernelError):
        one(1, "w4", bad, good)
    one.again()
    with pytest.raises(KernelError):
        one(1, "w8", bad, good)


def test_a_layer_that_gives_nothing_is_no_evidence() -> None:
    """Guards: a model with empty weights, as tests have, that cannot start."""
    empty = {name: torch.zeros_like(weight) for name, weight in weights().items()}
    look()(0, "w8", half(MLP, empty, norms()), half(MLP, empty, norms()))


def test_what_overflows_already_is_no_evidence() -> None:
    """Guards: a model whose own half precision overflows on random rows, and that cannot start or change for it."""
    loud = {name: weight * 1e30 for name, weight in weights().items()}
    look()(0, "w8", half(MLP, weights(), norms()), half(MLP, loud, norms()))
    with pytest.raises(KernelError):
        look()(0, "w8", half(MLP, loud, norms()), half(MLP, weights(), norms()))


def test_what_is_refused_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """Guards: garbage that stays staged, or in use, after it was found; a good format that pays for a bad one."""
    world = World(tmp_path)
    widths = {"self_attn.qkv_proj": 64, "mlp.down_proj": 128}
    world.swapper = swapper_of(world.slots, world.store, world.kernels, world.build_base, look=look(widths))
    pack = world.kernels["w4"].pack
    for layer in range(NUM_LAYERS):
        packed = {name: pack(torch.randn_like(t["weight"].float())) for name, t in world.base[layer].items()}
        world.store.write(layer, "w4", packed, "fake_w4")
    world.switch({0: "w8"})
    before, resident = world.impls(), world.swapper.resident_bytes
    for layer in (0, 1):
        with pytest.raises(KernelError, match=f"layer {layer}: .* in w4 compute something else"):
            world.swapper.prepare({layer: "w4"})
        assert world.impls() == before and world.swapper.staging_bytes == 0
    assert world.swapper.resident_bytes == resident
    world.switch({0: "base", 1: "w8"})
    assert world.swapper.formats() == {0: "base", 1: "w8", 2: "base"}
