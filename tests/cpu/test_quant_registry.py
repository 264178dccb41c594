"""A new format is two classes and one call: a toy of 3 bits goes the whole way, and leaves no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from quant_world import World, swapper_of
from torch import Tensor

from morphserve.config import LadderConfig, check_formats, parse_config
from morphserve.control.budget import RankBytes
from morphserve.control.ladder import build_ladder
from quant_layers import (
    CANDIDATES,
    FORMATS,
    KernelBase,
    KernelError,
    LinearImpl,
    Quant,
    VariantStore,
    check_kernel,
    choose,
    probe,
    register,
)
from quant_layers.kernels import registry
from quant_layers.kernels.cpu_linears import Rows, nbytes_of
from tests.half_steps import half_step


@dataclass(frozen=True, slots=True)
class QuantW3(Quant):
    """Seven levels around zero, one scale a row."""

    q: Tensor  # int8 [N, K], -3..3
    scale: Tensor  # fp32 [N]

    format = "w3"
    bits = 3
    coarsest_levels = 6
    per_row = True
    int8_activations = False

    @classmethod
    def of(cls, weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> QuantW3:
        values = weight.float()
        scale = values.abs().amax(dim=1) / 3
        return cls((values / scale[:, None]).round_().to(torch.int8), scale)

    @classmethod
    def packed_bytes(cls, n: int, k: int) -> int:
        return 3 * n * k // 8 + 4 * n

    def dequantize(self) -> Tensor:
        return self.q.float() * self.scale[:, None]


class W3Planes(KernelBase):
    """One bit of each weight in a plane of its own."""

    name, canonical = "w3_planes", QuantW3
    quantizes_activations = False

    def lay_out(self, quant: QuantW3) -> dict[str, Tensor]:
        bits = (quant.q + 3).to(torch.uint8).view(len(quant.q), -1, 8)
        weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
        planes = [(((bits >> plane) & 1) * weights).sum(-1, dtype=torch.uint8) for plane in range(3)]
        return {"planes": torch.stack(planes), "scale": quant.scale}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quant:
        planes = tensors["planes"].unsqueeze(-1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8)) & 1
        q = (planes[0] | (planes[1] << 1) | (planes[2] << 2)).flatten(1)
        return QuantW3(q.to(torch.int8) - 3, tensors["scale"])

    def build(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> LinearImpl:
        return PlanesLinear(self, tensors, bias)


class PlanesLinear(Rows):
    def __init__(self, kernel: W3Planes, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        self._kernel, self._tensors, self._bias = kernel, tensors, bias
        self.n, self.k = len(tensors["scale"]), 8 * tensors["planes"].shape[2]
        self.nbytes = nbytes_of(*tensors.values(), bias)

    def rows(self, x: Tensor) -> Tensor:
        bias = None if self._bias is None else self._bias.float()
        weight = self._kernel.reference(self._tensors)
        return torch.nn.functional.linear(x.float(), weight, bias).to(x.dtype)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """W3Planes is, and what was registered inside of the block is forgotten behind it."""
    with patch.dict(registry._kernels), patch.dict(registry._formats):
        register(W3Planes)
        yield


@pytest.fixture
def w3() -> Iterator[None]:
    with registered():
        yield


def test_a_registered_format_is_known_everywhere_and_then_nowhere() -> None:
    """Guards: a list of formats somewhere else, which a new one would have to be added to."""
    before = list(FORMATS), list(CANDIDATES)
    config = parse_config({"ladder": {"steps": [{"format": "w3"}]}, "kernels": {"w3": "w3_planes"}})
    with pytest.raises(KernelError, match="unknown format 'w3'"):
        choose("w3")
    with registered():
        check_formats(config, FORMATS)
        assert choose("w3", name=config.kernels["w3"]).name == "w3_planes" and probe()["w3_planes"].ok
        for twice in (W3Planes, type("Other", (W3Planes,), {"name": "other", "canonical": type("Q", (QuantW3,), {})})):
            with pytest.raises(KernelError, match="is registered already"):
                register(twice)
    assert (list(FORMATS), list(CANDIDATES)) == before
    halves = type("Halves", (W3Planes,), {"canonical": type("Q", (QuantW3,), {"format": "w8/w4"})})
    with pytest.raises(KernelError, match="without '/'"):
        register(halves)
    for name in ("tiny", "w4", "w13", "q3_"):
        other = type("Named", (W3Planes,), {"name": "named", "canonical": type("Q", (QuantW3,), {"format": name})})
        with pytest.raises(KernelError, match=f"format '{name}' must end in its bits, 3"):
            register(other)


@pytest.mark.usefixtures("w3")
def test_a_registered_format_is_packed_stored_swapped_and_restored(tmp_path: Path) -> None:
    """Guards: a step on the way that works for the formats it was written for, and for no other."""
    kernel = choose("w3")
    assert check_kernel(kernel).ok
    world = World(tmp_path / "built_in")
    directory = tmp_path / "with_w3"
    store = VariantStore.open(directory, "fp", {"w3": kernel.name})
    for layer, linears in world.base.items():
        store.write(layer, "base", linears)
        store.write(layer, "w3", {name: kernel.pack(t["weight"]) for name, t in linears.items()}, kernel.name)
    store = VariantStore.open(directory, "fp", {"w3": kernel.name})  # as the next start finds it
    store.verify()
    swapper = swapper_of(world.slots, store, {"w3": kernel}, world.build_base)
    before = world.base_digest()
    swapper.prepare({1: "w3"})
    swapper.commit()
    assert swapper.formats() == {0: "base", 1: "w3", 2: "base"}
    for name, slot in world.slots[1].items():
        tensors = store.read(1, "w3")[name]
        x = torch.randn(5, world.base[1][name]["weight"].shape[1]).bfloat16()
        expected = x.double() @ kernel.reference(tensors).double().t() + slot.bias.double()
        assert torch.allclose(slot.impl(x).double(), expected, rtol=2**-8, atol=1e-3)
        moved = (kernel.reference(tensors) - world.base[1][name]["weight"].float()).abs()
        assert (moved <= 1.001 * half_step(kernel.unpack(tensors))).all() and moved.max() > 0
    base, packed = store.nbytes(1, "base"), store.nbytes(1, "w3")
    assert packed == sum(QuantW3.packed_bytes(*t["weight"].shape) for t in world.base[1].values())
    sizes = {"base": [base] * 3, "w3": [packed] * 3}
    config = LadderConfig.model_validate({"steps": [{"format": "w3"}]})
    ladder = build_ladder(3, [RankBytes(sizes, 64)], config, 10)
    assert ladder[-1].layer_formats == ("w3",) * 3 and ladder[-1].weight_bytes == 3 * packed
    swapper.prepare({1: "base"})
    swapper.commit()
    assert world.base_digest() == before
