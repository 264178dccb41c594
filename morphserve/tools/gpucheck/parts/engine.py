"""T6: a small engine on the product's own pages, swapper and graph sets. What a set costs, what a switch costs, and
whether level 0 is level 0 again afterwards, bit by bit; and layers swapped in and out while it decodes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.device import MIB, Mark, free_bytes, require_device
from morphserve.tools.gpucheck.mini.engine import Generated, MiniEngine, same
from morphserve.tools.gpucheck.mini.model import SMALL, Shape


def run(bench: Bench) -> None:
    """See the module."""
    require_device(bench)
    start = time.perf_counter()
    engine = MiniEngine(bench, bench.pick(Shape(), SMALL), *bench.pick((3, 2), (2, 1)))
    try:
        bench.figure("build, pages and pinned copies included", "s", time.perf_counter() - start)
        levels = f"{engine.num_levels} levels of {engine.layers_per_level} layers"
        bench.note(f"{engine.shape}, {levels} in {engine.kernel.name}, {engine.num_pages} pages")
        outputs = _climb(bench, engine)
        _live(bench, engine, outputs)
        engine.move(0)
        bench.require("weights of level 0 are back, byte by byte", engine.rank.is_restored())
        free, reserve = engine.rank.num_free, engine.rank.reserve_pages
        bench.require("the reserve is whole", free == reserve, f"{free} of {reserve} pages")
    finally:
        engine.close()


def _climb(bench: Bench, engine: MiniEngine) -> dict[int, Generated]:
    """Up with nothing else running, capturing a graph set at each level, and down again."""
    num_steps = engine.model.max_steps // 4
    seconds: list[float] = []
    mebibytes: list[float] = []
    outputs: dict[int, Generated] = {}
    for level in range(engine.num_levels + 1):
        engine.move(level)
        before = free_bytes(bench.device)
        seconds.append(engine.capture_set())
        mebibytes.append((before - free_bytes(bench.device)) / MIB)
        outputs[level] = engine.generate(num_steps)
        _check_level(bench, engine, level, outputs[level])
    bench.require("graph sets differ", not same(outputs[0], outputs[engine.num_levels]), "quantized layers round")
    again = engine.generate(num_steps)
    bench.require("a level repeats itself", same(again, outputs[engine.level]))
    engine.move(0)
    bench.require("level 0 after a climb, bit by bit", same(engine.generate(num_steps), outputs[0]))
    bench.figure(f"capture a graph set: {len(engine.batches)} graphs of steps, and of pieces", "s", seconds)
    bench.figure("memory of a graph set after the first", "MiB", mebibytes[1:])
    bench.figure("memory of the first graph set", "MiB", mebibytes[0])
    for batch in (engine.batches[0], engine.batches[-1]):
        decoder = _Decoder(bench, engine, batch)
        times = [decoder.step() for _ in range(bench.pick(100, 3))]
        bench.figure(f"decode step, batch {batch}, level 0", "us", times)
    return outputs


def _check_level(bench: Bench, engine: MiniEngine, level: int, output: Generated) -> None:
    """Return what else gives a level's tokens, and where its pages are."""
    num_steps, cache = len(output[0]), engine.rank.cache
    with engine.rank.fresh_linears():
        expected = engine.generate(num_steps, graphs="none")
    bench.require(f"level {level}: graphs of steps give what linears made for its formats give", same(output, expected))
    pieces = engine.generate(num_steps, graphs="piecewise")
    bench.require(f"level {level}: and so do graphs of pieces", same(pieces, expected))
    if level:
        # Blocks that lie where a layer's weights were hold KV as well as any others.
        tail = engine.generate(num_steps, first_block=cache.num_mapped - engine.shape.num_blocks)
        bench.require(f"level {level}: KV in grown blocks gives the same tokens", same(tail, output))
        grown = cache.num_mapped - engine.shape.num_blocks
        bench.require(f"level {level}: KV has grown", grown > 0, f"by {grown} blocks")
    pages = engine.rank.num_pages()
    bench.require(f"level {level}: no page is lost", pages == engine.num_pages, f"{pages} of {engine.num_pages}")


@dataclass(slots=True)
class _Times:
    """Of moves while decoding, in one direction."""

    carried_us: list[float] = field(default_factory=list)  # steps beside which something was staged or handed over
    stage_ms: list[float] = field(default_factory=list)  # a layer, from the decision until it could be switched
    settle_ms: list[float] = field(default_factory=list)  # a layer, from the switch until its pages were another's
    switch_us: list[float] = field(default_factory=list)  # between two steps: slots and graph set


class _Decoder:
    """Steps without end; sequences begin anew when their room is used up."""

    def __init__(self, bench: Bench, engine: MiniEngine, batch: int) -> None:
        self._bench, self._engine, self._batch = bench, engine, batch
        self._left = 0

    def step(self) -> float:
        """Microseconds of one step, as a server sees it."""
        if not self._left:
            self._engine.model.reset()
            Mark(self._bench.device).wait()
            self._left = self._engine.model.max_steps
        self._left -= 1
        start = time.perf_counter()
        self._engine.decode(self._batch)
        Mark(self._bench.device).wait()
        return (time.perf_counter() - start) * 1e6


def _live(bench: Bench, engine: MiniEngine, outputs: dict[int, Generated]) -> None:
    """Up and down while decoding, again and again."""
    decoder = _Decoder(bench, engine, engine.shape.batch)
    times = {"in": _Times(), "out": _Times()}
    quiet: list[float] = []
    wrong: list[str] = []
    cycles = 0
    num_steps = len(outputs[0][0])
    while cycles < bench.pick(2, 1) or (bench.left_s > 0.2 * bench.budget_s and cycles < bench.pick(30, 1)):
        for level in [*range(1, engine.num_levels + 1), *range(engine.num_levels - 1, -1, -1)]:
            quiet += [decoder.step() for _ in range(bench.pick(30, 2))]
            _move_beside(engine, decoder, level, times["in" if level > engine.level else "out"])
        cycles += 1
        for level in (0, engine.num_levels):
            engine.move(level)
            if not same(engine.generate(num_steps), outputs[level]):
                wrong.append(f"cycle {cycles}, level {level}")
        engine.move(0)
        decoder = _Decoder(bench, engine, engine.shape.batch)
    bench.require(f"{cycles} cycles while decoding give what no cycle gave, bit by bit", not wrong, "; ".join(wrong))
    reference = bench.figure("decode step, nothing moves", "us", quiet)
    for direction, found in times.items():
        _report(bench, direction, found, reference.median)


def _move_beside(engine: MiniEngine, decoder: _Decoder, target: int, times: _Times) -> None:
    """Go to the next level as a server does: the rank's thread works, steps go on, and each asks how far it is."""
    layers = engine.layers_per_level
    for took in engine.move(target, lambda: times.carried_us.append(decoder.step())):
        times.stage_ms.append(took.stage_s * 1e3 / layers)
        times.switch_us.append(took.switch_s * 1e6)
        times.settle_ms.append(took.settle_s * 1e3 / layers)


def _report(bench: Bench, direction: str, found: _Times, quiet_us: float) -> None:
    if found.carried_us:
        carried = bench.figure(f"decode step beside a swap {direction}", "us", found.carried_us)
        ratio = carried.p99 / quiet_us
        bench.figure(f"p99 step beside a swap {direction} over the median quiet one", "ratio", ratio)
        if not bench.dry:
            name = f"a swap {direction} is hidden: p99 step under 1.25 of the median"
            bench.expect(name, ratio < 1.25, f"{ratio:.2f}")
    bench.figure(f"a layer {direction}: staged behind decode", "ms", found.stage_ms)
    bench.figure(f"a layer {direction}: pages handed over behind decode", "ms", found.settle_ms)
    bench.figure(f"switch {direction}: slots and graph set, between two steps", "us", found.switch_us)
