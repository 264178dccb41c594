"""Every kernel on a layer of a live engine, held to what rounding to its format can do to a weight, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import rank_probe
from engine.harness import PROMPTS, engine, generate
from quant_world import swapper_of
from safetensors.torch import load_file
from torch import Tensor

from morphserve.cpu_tier import best_dtype
from morphserve.integration.worker.state import rank
from quant_layers import BASE, CANDIDATES, Kernel, LinearImpl, LinearSlot, VariantStore
from tests.half_steps import half_step

pytestmark = pytest.mark.cpu_tier

LAYER = 7
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
DTYPE = getattr(torch, best_dtype())
# Half the distance of two neighbours, as a share of the smaller: results are rounded to the dtype, sums kept in fp32.
HALF_ULP, FP32_HALF_ULP = torch.finfo(DTYPE).eps / 2, torch.finfo(torch.float32).eps / 2


@dataclass(frozen=True)
class Live:
    llm: Any
    slots: dict[str, LinearSlot]
    weights: dict[str, Tensor]  # as the checkpoint has them, in fp64
    inputs: dict[str, Tensor]  # what the layer's linears saw while the engine generated
    outputs: dict[str, Tensor]  # of them, at level 0
    tokens: list[Any]

    def run(self, name: str, x: Tensor) -> Tensor:
        """What the model's own linear answers."""
        linear = rank().layers.linears[LAYER][name]
        return linear.quant_method.apply(linear, x, None)


class Recorder:
    """Stands before an implementation and keeps what it is asked."""

    def __init__(self, impl: Callable[[Tensor], Tensor]) -> None:
        self.impl, self.nbytes, self.seen = impl, 0, []

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return self.impl(x)


def checkpoint_weight(tensors: dict[str, Tensor], name: str) -> Tensor:
    """A linear of vLLM's, fused from the file's tensors."""
    owner, _, last = name.rpartition(".")
    parts = FUSED.get(last, (last,))
    return torch.cat([tensors[f"model.layers.{LAYER}.{owner}.{part}.weight"] for part in parts]).double()


@pytest.fixture(scope="module")
def live(demo_model: Path, variant_cache: Path) -> Iterator[Live]:
    tensors: dict[str, Tensor] = {}
    for file in demo_model.glob("*.safetensors"):
        tensors |= load_file(file)
    with engine(demo_model, variant_cache) as llm:
        slots = rank().swapper._slots[LAYER]
        recorders = {name: Recorder(slot.impl) for name, slot in slots.items()}
        for name, slot in slots.items():
            slot.impl = recorders[name]
        tokens = generate(llm, PROMPTS, 8)
        for name, slot in slots.items():
            slot.impl = recorders[name].impl
        inputs = {name: torch.cat(recorder.seen) for name, recorder in recorders.items()}
        llm.reset_prefix_cache()
        yield Live(
            llm, slots, {name: checkpoint_weight(tensors, name) for name in slots}, inputs,
            {name: slots[name].impl(x) for name, x in inputs.items()}, tokens,
        )  # fmt: skip


def excess(
    kernel: Kernel, tensors: dict[str, Tensor], weight: Tensor | None, x: Tensor, y: Tensor, exact_x: bool = False
) -> float:
    """Largest error of `y` as a share of what rounding can explain.

    |y - x w| <= |x| dw + dx |w'| + rounding of the result, with w' the weight that the packed tensors mean, and dw and
    dx the half steps by which weights and activations were rounded: nothing here is fitted.

    Args:
        weight: of the checkpoint, fp64; None to compare with what the packed tensors mean, where dw is 0.
        exact_x: whether the kernel's grid for activations has these on it.
    """
    quant = kernel.unpack(tensors)
    wide, meaning = x.double(), quant.dequantize().double()
    total = wide.abs() @ meaning.abs().t()
    bound = torch.zeros_like(total) if weight is None else wide.abs() @ half_step(quant).double().t()
    if not exact_x:
        bound += kernel.activation_half_step(x) @ meaning.abs().t()
    exact = wide @ (meaning if weight is None else weight).t()
    bound += HALF_ULP * (exact.abs() + bound) + 2 * x.shape[1] * FP32_HALF_ULP * total
    if not kernel.quantizes_activations:
        bound += HALF_ULP * total  # these widen the weights to the dtype, each rounded once
    return float(((y.double() - exact).abs() / bound).max())


@pytest.mark.parametrize("make", CANDIDATES, ids=lambda make: make.name)
def test_a_live_layer_errs_by_no_more_than_its_rounding(
    live: Live, tmp_path: Path, make: Callable[[torch.dtype], Kernel]
) -> None:
    """Guards: a kernel that reproduces its packed tensors, where these do not mean the weight; a layer not restored."""
    kernel = make(DTYPE)
    if why := kernel.unavailable():  # Triton's interpreter has a process of its own: tests/triton_probe.py
        pytest.skip(why)
    layers = rank().layers
    base = rank_probe.store_of().read(LAYER, BASE)
    store = VariantStore.open(tmp_path, "fp", {kernel.format: kernel.name})
    store.write(LAYER, BASE, base)
    store.write(LAYER, kernel.format, {n: kernel.pack(t["weight"]) for n, t in base.items()}, kernel.name)

    def build_base(layer: int, name: str, tensors: dict[str, Tensor]) -> LinearImpl:
        return layers._bases[layer][name].build(tensors)

    swapper = swapper_of({LAYER: live.slots}, store, {kernel.format: kernel}, build_base)
    swapper.prepare({LAYER: kernel.format})
    swapper.commit()
    try:
        for name, tensors in store.read(LAYER, kernel.format).items():
            x = live.inputs[name]
            y = live.run(name, x)
            hot = torch.eye(x.shape[1], dtype=DTYPE)  # each weight by itself: in a sum, errors hide each other
            shares = {
                "weight": excess(kernel, tensors, live.weights[name], x, y),
                "packed": excess(kernel, tensors, None, x, y),
                "one by one": excess(kernel, tensors, live.weights[name], hot, live.run(name, hot), exact_x=True),
            }
            assert max(shares.values()) <= 1, (name, shares)
            assert shares["one by one"] > 0.8, "the bound is so wide that it proves nothing"
        assert generate(live.llm, PROMPTS, 8) != live.tokens, "the engine never ran the swapped layer"
    finally:
        swapper.prepare({LAYER: BASE})
        swapper.commit()
        live.llm.reset_prefix_cache()
    for name, x in live.inputs.items():
        assert torch.equal(live.run(name, x), live.outputs[name]), name
    assert generate(live.llm, PROMPTS, 8) == live.tokens
    live.llm.reset_prefix_cache()
