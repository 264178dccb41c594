"""T7: the opaque linear under torch.compile. One compilation for all layers' levels, none at a switch, and graphs
captured through it, of whole steps and of pieces that levels share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from morphserve.residence import WeightSlot, register_op, reset
from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.device import (
    Mark,
    Work,
    capture,
    graph_pool,
    random_weight,
    require_device,
    synchronize,
)
from morphserve.tools.gpucheck.mini.engine import Generated, MiniEngine, choose_kernel, same
from morphserve.tools.gpucheck.mini.model import SMALL, BaseLinear, Shape
from quant_layers import BASE, LinearImpl

_LINEARS = ("up", "down")
_PIECES = Shape(8, 2048, 16, 4, 128, 5632, 4096, blocks_per_seq=8)
Formats = tuple[str, ...]


def run(bench: Bench) -> None:
    """See the module."""
    require_device(bench)
    register_op()
    reset()
    try:
        _check(bench, _Model(bench))
    finally:
        reset()
    shape = bench.pick(_PIECES, SMALL)
    engine = MiniEngine(bench, shape, num_levels=shape.layers, layers_per_level=1)
    try:
        _check_pieces(bench, engine)
    finally:
        engine.close()


class _Model:
    """Layers of two linears around an activation, each linear called by its weight alone."""

    def __init__(self, bench: Bench) -> None:
        self.layers, self.hidden, inner = bench.pick((8, 2048, 5632), (4, 64, 96))
        kernel = choose_kernel(bench)
        shapes = {"up": (inner, self.hidden), "down": (self.hidden, inner)}
        self._weights: list[dict[str, Tensor]] = []
        self._slots: list[tuple[WeightSlot, LinearImpl, LinearImpl]] = []  # slot, base, quantized
        for layer in range(self.layers):
            row = {}
            for number, name in enumerate(_LINEARS):
                weight = row[name] = random_weight(*shapes[name], bench.device, seed=10 * layer + number)
                base = BaseLinear(weight)
                slot = WeightSlot(f"{layer}.{name}", base, weight)
                self._slots.append((slot, base, kernel.build(kernel.pack(weight), None)))
            self._weights.append(row)

    def switch(self, num_layers: int) -> None:
        """Set the first `num_layers` quantized, the others not."""
        for number, (slot, base, quantized) in enumerate(self._slots):
            slot.impl = quantized if number // len(_LINEARS) < num_layers else base

    def forward(self, x: Tensor) -> Tensor:
        """Compute [B, H] -> [B, H], as torch.compile is to see it."""
        linear_of = torch.ops.morphserve.linear_of
        for row in self._weights:
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
    """Replay a graph for each level, in any order; the slots may stand elsewhere meanwhile."""
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
    """Return a backend of torch.compile that notes each graph it is given."""
    inner: Callable[..., Any] = torch._dynamo.lookup_backend(name)

    def backend(module: Any, inputs: Any, **options: Any) -> Any:
        calls.append(len(inputs))
        return inner(module, inputs, **options)

    return backend


def _check_pieces(bench: Bench, engine: MiniEngine) -> None:
    """Capture the graphs of four levels, then replay their pieces at these formats and between them."""
    num_layers, quantized = engine.shape.layers, engine.kernel.format

    def at(*layers: int) -> Formats:
        return tuple(quantized if layer in layers else BASE for layer in range(num_layers))

    half = tuple(range(num_layers // 2))
    levels = [at(), at(*half), at(*range(num_layers)), at(num_layers - 1)]
    mixed = at(*half, num_layers - 1)  # pieces of two levels
    expected = {}
    for formats in (*levels, mixed):
        engine.switch(formats)
        expected[formats] = engine.generate(engine.shape.block_size, graphs="none")
    for formats in levels:
        engine.switch(formats)
        engine.capture_set()
    counts = list(engine.graph_sets.num_graphs().values())
    bench.require("later levels capture fewer pieces", max(counts[1:]) <= counts[0] > min(counts[1:]), f"{counts}")
    _replay_pieces(bench, engine, [*levels, mixed, *reversed(levels)] * bench.pick(5, 1), expected)
    bench.require("nothing was captured while serving", list(engine.graph_sets.num_graphs().values()) == counts)


def _replay_pieces(bench: Bench, engine: MiniEngine, order: list[Formats], expected: dict[Formats, Generated]) -> None:
    wrong: list[str] = []
    lacking: set[tuple[Formats, int]] = set()
    for turn, formats in enumerate(order):
        engine.switch(formats)
        lacking |= {(formats, number) for number, piece in enumerate(engine.model.pieces) if not piece.entries}
        if lacking:
            break
        found = engine.generate(engine.shape.block_size, graphs="piecewise")
        if not same(found, expected[formats]):
            wrong.append(f"turn {turn}: {formats}")
    bench.require("every piece has a graph at every level", not lacking, f"{sorted(lacking)[:3]}")
    bench.require("pieces of several levels in one step give what the layers give", not wrong, "; ".join(wrong[:3]))
