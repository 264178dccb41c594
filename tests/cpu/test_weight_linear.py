"""The opaque linear of the CUDA path under torch.compile: one artefact for all layers and all levels.

Runs on CPU. That CUDA graphs may be captured through it shows on a device only.
"""

from __future__ import annotations

import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quant_world import LINEARS, NUM_LAYERS, World, swapper_of
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from morphserve.residence import WeightError, WeightSlot, register_op, reset, slots
from morphserve.residence.graphs import weight_linear

ROOT = Path(__file__).parents[2]
QKV, DOWN = LINEARS  # 64 -> 96, 128 -> 64


class Layer(torch.nn.Module):
    """What vLLM's layer looks like to the compiler: weights, and the operator called with them."""

    def __init__(self, qkv: Tensor, down: Tensor) -> None:
        super().__init__()
        self.qkv = torch.nn.Parameter(qkv, requires_grad=False)
        self.down = torch.nn.Parameter(down, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = torch.ops.morphserve.linear_of(torch.tanh(x), self.qkv)
        gated = torch.cat([torch.nn.functional.silu(qkv), qkv[..., :32]], dim=-1)
        return x + torch.ops.morphserve.linear_of(gated, self.down)


class Stack(World):
    """A model of such layers, with the swapper that serves on its slots."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.layers = torch.nn.ModuleList(
            Layer(self.base[i][QKV]["weight"], self.base[i][DOWN]["weight"]) for i in range(NUM_LAYERS)
        )
        self.slots = {
            i: {
                name: WeightSlot(f"{i}.{name}", slot.impl, weight, bias=slot.bias)
                for (name, slot), weight in zip(self.slots[i].items(), (layer.qkv, layer.down), strict=True)
            }
            for i, layer in enumerate(self.layers)
        }
        self.swapper = swapper_of(self.slots, self.store, self.kernels, self.build_base)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def compiled(self, backend: Any) -> Callable[[Tensor], Tensor]:
        """Each layer through one compiled function, as a piece that was compiled once is."""
        torch._dynamo.reset()
        counters.clear()
        for layer in self.layers:
            layer.compile(backend=backend, fullgraph=True, dynamic=True)
        return self.forward


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    register_op()
    reset()
    with torch.inference_mode():
        yield Stack(tmp_path)
    reset()


def rows(count: int) -> Tensor:
    return torch.randn((count, 64), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_serves_all_layers_and_levels(stack: Stack, backend: str) -> None:
    """Guards: a compilation for every layer or level, a level's weights baked into the graph, a copy of the weight."""
    batches = [rows(5), rows(3), rows(17)]
    plain = [stack.forward(x) for x in batches]
    run = stack.compiled(backend)
    first = [run(x) for x in batches]
    assert counters["stats"]["unique_graphs"] == 1
    for found, expected in zip(first, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)  # inductor has its own tanh
    with torch.compiler.set_stance("fail_on_recompile"):
        seen = [first]
        for changes in ({0: "w8", 2: "w4"}, {0: "w4", 1: "w8"}, {1: "base/w4"}):
            stack.switch(changes)
            level = [run(x) for x in batches]
            assert all(not torch.equal(now, before) for past in seen for now, before in zip(level, past, strict=True))
            seen.append(level)
        stack.switch(dict.fromkeys(range(NUM_LAYERS), "base"))
        assert all(torch.equal(run(x), before) for x, before in zip(batches, first, strict=True))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_whole_model_is_not_compiled_anew_by_a_switch(stack: Stack) -> None:
    """Guards: the same where vLLM traces the model as one graph."""
    torch._dynamo.reset()
    run = torch.compile(stack.forward, backend="aot_eager", fullgraph=True, dynamic=True)
    first = run(rows(5))
    with torch.compiler.set_stance("fail_on_recompile"):
        stack.switch({1: "w4"})
        assert not torch.equal(run(rows(5)), first)
        run(rows(9))
        stack.switch({1: "base"})
        assert torch.equal(run(rows(5)), first)


def test_graphs_of_different_layers_are_the_same_text(stack: Stack) -> None:
    """Guards: a name or a number in the graph, by which vLLM would compile a piece for every layer."""
    texts: list[str] = []
    codes: list[str] = []

    def keep(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        texts.append(graph.print_readable(print_output=False, include_stride=True, include_device=True))
        codes.append(graph.code)
        return graph.forward

    for layer in stack.layers:
        torch._dynamo.reset()  # as vLLM, which traces every layer, and then looks for what it has compiled
        torch.compile(layer, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=True)(rows(5))
    assert len(texts) == NUM_LAYERS and len(set(texts)) == 1
    assert texts[0].count("linear_of.default") == 2
    assert not any(name in codes[0] for name in ("qkv", "down", "proj", "layers"))


def test_a_compiled_layer_is_found_for_the_next_one(stack: Stack) -> None:
    """Guards: the same by the key under which vLLM looks for a piece that it has compiled already."""
    counters.clear()
    with (
        fresh_cache(),
        torch._functorch.config.patch(enable_autograd_cache=True, autograd_cache_normalize_inputs=True),
    ):
        for layer in stack.layers:
            torch._dynamo.reset()
            x = rows(5)
            found = torch.compile(layer, fullgraph=True, dynamic=True)(x)
            torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-3)
    assert counters["aot_autograd"]["autograd_cache_miss"] == 1
    assert counters["aot_autograd"]["autograd_cache_hit"] == NUM_LAYERS - 1


def test_the_operator_keeps_its_contract(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an operator that writes or returns its inputs, or a fake of another shape, stride or dtype."""

    class AnyAddress(dict[int, WeightSlot]):
        """The check copies its inputs: here the slot is found wherever the weight lies."""

        def __missing__(self, address: int) -> WeightSlot:
            return stack.slots[0][QKV]

    monkeypatch.setattr(weight_linear, "_slots", AnyAddress())
    weight = stack.layers[0].qkv
    with torch.inference_mode(False):
        for x in (torch.randn(5, 64), torch.randn(2, 3, 64)):
            results = torch.library.opcheck(torch.ops.morphserve.linear_of.default, (x, weight.detach().clone()))
            assert set(results.values()) == {"SUCCESS"}


_UNREADABLE = """
import ctypes, mmap, torch
from morphserve.residence import WeightSlot, register_op
register_op()
memory = mmap.mmap(-1, 64 * 64 * 4)
weight = torch.frombuffer(memory, dtype=torch.float32).view(64, 64)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mprotect(ctypes.c_void_p(weight.data_ptr()), ctypes.c_size_t(64 * 64 * 4), 0) == 0  # PROT_NONE
WeightSlot("unmapped", lambda x: x * 2, weight)
with torch.inference_mode():
    for backend in ("eager", "aot_eager"):  # inductor could only read a copy: its address would be unknown
        print(backend, flush=True)
        torch._dynamo.reset()
        run = torch.compile(
            lambda x, w: torch.ops.morphserve.linear_of(x, w) + 1, backend=backend, fullgraph=True, dynamic=True
        )
        for n in (3, 5):
            assert torch.equal(run(torch.ones(n, 64), weight), torch.full((n, 64), 3.0))
print("never read")
"""


def test_the_weight_is_never_read() -> None:
    """Guards: a read of pages that are unmapped while a layer is quantized: on a device, an illegal access."""
    done = subprocess.run([sys.executable, "-c", _UNREADABLE], cwd=ROOT, capture_output=True, text=True)
    told = f"rc {done.returncode} {done.stdout} {done.stderr[-2000:]}"
    assert done.stdout.endswith("\nnever read\n"), told


def test_a_weight_that_nobody_registered_is_named(stack: Stack) -> None:
    """Guards: KeyError in the middle of a step, for a weight that was moved after it was registered."""
    layer = stack.layers[0]
    moved = layer.qkv.clone()
    with pytest.raises(WeightError, match=rf"{moved.data_ptr():#x}, {2 * NUM_LAYERS} others are"):
        torch.ops.morphserve.linear_of(rows(2), moved)


def test_two_linears_need_two_addresses(stack: Stack) -> None:
    """Guards: one of two tied weights is switched with the other's layer."""
    slot = stack.slots[1][QKV]
    weight = stack.layers[1].qkv
    for same in (weight, weight[:8]):
        with pytest.raises(WeightError, match=rf"'twin'.*{slot.address:#x}.*{re.escape(slot.name)}"):
            WeightSlot("twin", slot.impl, same)
    assert slots()[slot.address] is slot
    for homeless in (torch.empty((4, 4), device="meta"), torch.empty((0, 4)), torch.empty(4)):
        with pytest.raises(WeightError, match="memory of its own"):
            WeightSlot("homeless", slot.impl, homeless)
    assert len(slots()) == 2 * NUM_LAYERS


def test_a_slot_keeps_its_address(stack: Stack) -> None:
    """Guards: a freed weight's address is given to another tensor, which then runs this linear."""
    memory = np.zeros((96, 64), np.float32)
    alive = weakref.ref(memory)
    weight = torch.from_numpy(memory)
    slot = WeightSlot("kept", stack.slots[0][QKV].impl, weight)
    del memory, weight
    assert alive() is not None and slots()[slot.address] is slot
    reset()
    del slot
    assert alive() is None


def test_who_is_who(stack: Stack) -> None:
    """Guards: slots of the model that this process held before."""
    assert [slot.name for slot in slots().values()] == [f"{i}.{name}" for i in range(NUM_LAYERS) for name in LINEARS]
    assert all(slot.address == address for address, slot in slots().items())
    assert all(slot.format == "base" and slot.bias is not None for slot in slots().values())
    reset()
    assert not slots()
    with pytest.raises(WeightError, match="0 others"):
        stack.forward(rows(2))


def test_registering_twice_and_beside_others() -> None:
    """Guards: an error when vLLM loads the plugin again; a clash with the operators of compiled CPU models."""
    register_op()
    other = torch.library.Library(weight_linear.NAMESPACE, "FRAGMENT")
    try:
        other.define("test_beside(Tensor x) -> Tensor")
        other.impl("test_beside", lambda x: x + 1, "CPU")
        register_op()
        assert torch.equal(torch.ops.morphserve.test_beside(torch.ones(1)), torch.full((1,), 2.0))
    finally:
        other._destroy()
    assert torch.ops.morphserve.linear_of.default.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA)
