"""T7: the opaque linear under torch.compile. One compilation for all layers' levels, none at a switch, and graphs
captured through it, of whole steps and of pieces that levels share."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from morphserve.residence import Formats
from morphserve.tools.gpucheck.bench import Bench, Skip
from morphserve.tools.gpucheck.device import (
    Mark,
    Work,
    capture,
    graph_pool,
    random_weight,
    require_device,
    synchronize,
)
from morphserve.tools.gpucheck.mini_model import BaseLinear
from morphserve.tools.gpucheck.pieces import BASE, QUANTIZED, check_pieces
from quant_layers import CANDIDATES

_MODULE = "morphserve.residence.graphs.weight_linear"
_LINEARS = ("up", "down")


def run(bench: Bench) -> None:
    """See the module."""
    require_device(bench)
    if not is_there():
        raise Skip(f"{_MODULE} is not there yet")
    module = importlib.import_module(_MODULE)
    module.register_op()
    try:
        model = _Model(bench, module)
        _check(bench, model)
        check_pieces(bench, model.weights, model.layer_of(), model.switch_to)
    finally:
        module.reset()


def is_there() -> bool:
    """Whether this tree has the operator."""
    try:
        return importlib.util.find_spec(_MODULE) is not None
    except ModuleNotFoundError:  # not even its package
        return False


class _Model:
    """Layers of two linears around an activation, each linear called by its weight alone."""

    def __init__(self, bench: Bench, module: Any) -> None:
        self.layers, self.hidden, inner = bench.pick((8, 2048, 5632), (4, 64, 96))
        kernel: Any = next(make for make in CANDIDATES if make.name == bench.pick("w4a16_triton", "fp8a16"))
        kernel = kernel(torch.bfloat16)
        shapes = {"up": (inner, self.hidden), "down": (self.hidden, inner)}
        self.weights: list[dict[str, Tensor]] = []
        self._slots: list[tuple[Any, Any, Any]] = []  # slot, base, quantized
        for layer in range(self.layers):
            row = {}
            for number, name in enumerate(_LINEARS):
                weight = row[name] = random_weight(*shapes[name], bench.device, seed=10 * layer + number)
                base = BaseLinear(weight)
                slot = module.WeightSlot(f"{layer}.{name}", base, weight)
                self._slots.append((slot, base, kernel.build(kernel.pack(weight), None)))
            self.weights.append(row)

    def switch(self, num_layers: int) -> None:
        """The first `num_layers` quantized, the others not."""
        self.switch_to(tuple(QUANTIZED if layer < num_layers else BASE for layer in range(self.layers)))

    def switch_to(self, formats: Formats) -> None:
        """By layer."""
        for number, (slot, base, quantized) in enumerate(self._slots):
            slot.impl = quantized if formats[number // len(_LINEARS)] == QUANTIZED else base

    def layer_of(self) -> dict[int, int]:
        """By the address of a weight."""
        return {weight.data_ptr(): layer for layer, row in enumerate(self.weights) for weight in row.values()}

    def forward(self, x: Tensor) -> Tensor:
        """[B, H] -> [B, H], as torch.compile is to see it."""
        linear_of = torch.ops.morphserve.linear_of
        for row in self.weights:
            inner = F.silu(linear_of(F.rms_norm(x, (self.hidden,)), row["up"]))
            x = x + linear_of(inner, row["down"])
        return x


def _check(bench: Bench, model: _Model) -> None:
    compilations: list[int] = []
    backend = _counting(bench.pick("inductor", "aot_eager"), compilations)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=False)
    x = random_weight(16, model.hidden, bench.device, seed=77) * model.hidden**0.5
    start = time.perf_counter()
    reference = compiled(x).clone()
    synchronize(bench.device)
    bench.figure("compile, first call included", "s", time.perf_counter() - start)
    bench.require("compiled once", len(compilations) == 1, f"{len(compilations)} times")
    eager = model.forward(x).float()
    error = float((reference.float() - eager).norm() / eager.norm())
    bench.require("compiled and eager agree but for rounding", error < 0.02, f"{error:.4f} of the norm")

    outputs = {0: reference}
    for level in (1, model.layers // 2, model.layers):
        model.switch(level)
        outputs[level] = compiled(x).clone()
        bench.require(f"{level} layers quantized show", not torch.equal(outputs[level], reference))
    model.switch(0)
    bench.require("level 0 is bit-identical after switches", torch.equal(compiled(x), reference))
    bench.require("no compilation at a switch", len(compilations) == 1, f"{len(compilations)} in all")
    _check_graphs(bench, model, compiled, x, outputs)
    bench.require("nor by graphs", len(compilations) == 1, f"{len(compilations)} in all")
    bench.figure("compilations", "count", len(compilations))


def _check_graphs(
    bench: Bench, model: _Model, compiled: Callable[[Tensor], Tensor], x: Tensor, outputs: dict[int, Tensor]
) -> None:
    """A graph for each level, replayed in any order; the slots may stand elsewhere meanwhile."""
    out = torch.zeros_like(x)
    pool = graph_pool(bench.device)
    graphs: dict[int, Work] = {}

    def work() -> None:
        out.copy_(compiled(x))

    for level in outputs:
        model.switch(level)
        graphs[level] = capture(bench.device, work, pool)
    wrong = []
    times: dict[int, list[float]] = {level: [] for level in outputs}
    for turn in range(bench.pick(30, 2)):
        for level, replay in graphs.items():
            if bench.dry:  # nothing was captured: what runs is what the slots hold
                model.switch(level)
            out.zero_()
            first = Mark(bench.device)
            replay()
            last = Mark(bench.device)
            last.wait()
            times[level].append(last.us_since(first))
            if not torch.equal(out, outputs[level]):
                wrong.append(f"level {level}, replay {turn}")
    bench.require("graphs give what their level gave", not wrong, "; ".join(wrong[:3]))
    for level, values in times.items():
        bench.figure(f"replay with {level} of {model.layers} layers quantized", "us", values)


def _counting(name: str, calls: list[int]) -> Callable[..., Any]:
    """A backend of torch.compile that notes each graph it is given."""
    inner: Callable[..., Any] = torch._dynamo.lookup_backend(name)

    def backend(module: Any, inputs: Any, **options: Any) -> Any:
        calls.append(len(inputs))
        return inner(module, inputs, **options)

    return backend
