"""T6: a small engine whose levels are banks of graphs. What a bank costs, what a switch costs, and whether level 0 is
level 0 again afterwards, bit by bit; and layers swapped in and out while it decodes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.device import MIB, Mark, free_bytes, require_device
from morphserve.tools.gpucheck.mini_engine import MiniEngine

Generated = tuple[Tensor, Tensor]


def run(bench: Bench) -> None:
    """See the module."""
    require_device(bench)
    start = time.perf_counter()
    engine = MiniEngine(bench)
    try:
        bench.figure("build, pages and pinned copies included", "s", time.perf_counter() - start)
        levels = f"{engine.num_levels} levels of {engine.layers_per_level} layers"
        bench.note(f"{engine.shape}, {levels} in {engine.kernel.name}, {engine.num_pages} pages")
        outputs = _climb(bench, engine)
        _live(bench, engine, outputs)
        engine.move(0)
        bench.require("weights of level 0 are back, byte by byte", engine.restored())
        free = engine.pool.num_free
        bench.require("the reserve is whole", free == engine.reserve_pages, f"{free} of {engine.reserve_pages} pages")
    finally:
        engine.close()


def _climb(bench: Bench, engine: MiniEngine) -> dict[int, Generated]:
    """Up with nothing else running, capturing a bank at each level, and down again."""
    num_steps = engine.model.max_steps // 4
    seconds: list[float] = []
    mebibytes: list[float] = []
    outputs: dict[int, Generated] = {}
    for level in range(engine.num_levels + 1):
        engine.move(level)
        before = free_bytes(bench.device)
        seconds.append(engine.capture_bank())
        mebibytes.append((before - free_bytes(bench.device)) / MIB)
        outputs[level] = engine.generate(num_steps)
        if level:
            # Blocks that lie where a layer's weights were hold KV as well as any others.
            tail = engine.generate(num_steps, first_block=engine.model.cache.num_mapped - engine.model.base_blocks)
            bench.require(f"level {level}: KV in grown blocks gives the same tokens", _same(tail, outputs[level]))
    bench.require("banks differ", not _same(outputs[0], outputs[engine.num_levels]), "quantized layers round")
    again = engine.generate(num_steps)
    bench.require("a level repeats itself", _same(again, outputs[engine.level]))
    engine.move(0)
    bench.require("level 0 after a climb, bit by bit", _same(engine.generate(num_steps), outputs[0]))
    bench.figure(f"capture a bank of {len(engine.batches)} graphs", "s", seconds)
    bench.figure("memory of a bank after the first", "MiB", mebibytes[1:])
    bench.figure("memory of the first bank", "MiB", mebibytes[0])
    for batch in (engine.batches[0], engine.batches[-1]):
        bench.figure(f"decode step, batch {batch}, level 0", "us", _step_times(bench, engine, batch))
    return outputs


def _same(one: Generated, other: Generated) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def _step_times(bench: Bench, engine: MiniEngine, batch: int) -> list[float]:
    engine.model.reset()
    times = []
    for _ in range(bench.pick(100, 3)):
        start = time.perf_counter()
        engine.decode(batch)
        Mark(bench.device).wait()
        times.append((time.perf_counter() - start) * 1e6)
    return times


@dataclass(slots=True)
class _Times:
    """Of moves while decoding, by direction."""

    carried_us: list[float] = field(default_factory=list)  # steps beside which something was staged or retired
    stage_ms: list[float] = field(default_factory=list)  # a layer, from the decision until it could be flipped
    retire_ms: list[float] = field(default_factory=list)  # a layer, from the flip until its pages were somebody else's
    flip_us: list[float] = field(default_factory=list)  # between two steps: slots and bank


class _Decoder:
    """Steps without end; sequences begin anew when their room is used up."""

    def __init__(self, bench: Bench, engine: MiniEngine) -> None:
        self._bench, self._engine = bench, engine
        self._left = 0

    def step(self) -> float:
        """Microseconds of one step, as a server sees it."""
        if not self._left:
            self._engine.model.reset()
            Mark(self._bench.device).wait()
            self._left = self._engine.model.max_steps
        self._left -= 1
        start = time.perf_counter()
        self._engine.decode()
        Mark(self._bench.device).wait()
        return (time.perf_counter() - start) * 1e6


def _live(bench: Bench, engine: MiniEngine, outputs: dict[int, Generated]) -> None:
    """Up and down while decoding, again and again."""
    decoder = _Decoder(bench, engine)
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
        if not _same(engine.generate(num_steps), outputs[0]):
            wrong.append(f"cycle {cycles}, level 0")
        engine.move(engine.num_levels)
        if not _same(engine.generate(num_steps), outputs[engine.num_levels]):
            wrong.append(f"cycle {cycles}, level {engine.num_levels}")
        engine.move(0)
        decoder = _Decoder(bench, engine)
    bench.require(f"{cycles} cycles while decoding give what no cycle gave, bit by bit", not wrong, "; ".join(wrong))
    reference = bench.figure("decode step, nothing moves", "us", quiet)
    for direction, found in times.items():
        _report(bench, direction, found, reference.median)


def _report(bench: Bench, direction: str, found: _Times, quiet_us: float) -> None:
    if found.carried_us:
        carried = bench.figure(f"decode step beside a swap {direction}", "us", found.carried_us)
        ratio = carried.p99 / quiet_us
        bench.figure(f"p99 step beside a swap {direction} over the median quiet one", "ratio", ratio)
        if not bench.dry:
            name = f"a swap {direction} is hidden: p99 step under 1.25 of the median"
            bench.expect(name, ratio < 1.25, f"{ratio:.2f}")
    bench.figure(f"a layer {direction}: staged behind decode", "ms", found.stage_ms)
    bench.figure(f"a layer {direction}: pages handed over behind decode", "ms", found.retire_ms)
    bench.figure(f"switch {direction}: slots and bank, between two steps", "us", found.flip_us)


def _move_beside(engine: MiniEngine, decoder: _Decoder, target: int, times: _Times) -> None:
    """One level, staged and retired by another thread while this one decodes."""
    source = engine.level
    layers = engine.layers_per_level
    times.stage_ms.append(_beside(decoder, lambda: engine.stage(target), times.carried_us) / layers)
    start = time.perf_counter()
    flipped = engine.flip(target)
    times.flip_us.append((time.perf_counter() - start) * 1e6)
    times.retire_ms.append(_beside(decoder, lambda: engine.retire(source, flipped), times.carried_us) / layers)


def _beside(decoder: _Decoder, work: Callable[[], None], steps_us: list[float]) -> float:
    """Run `work` in a thread while this one decodes; milliseconds that it took.

    Raises:
        RuntimeError: the work failed; its own error is the cause.
    """
    took: list[float] = []
    failed: list[BaseException] = []

    def run_it() -> None:
        start = time.perf_counter()
        try:
            work()
        except BaseException as e:  # raised again in the thread that decodes
            failed.append(e)
        took.append((time.perf_counter() - start) * 1e3)

    thread = threading.Thread(target=run_it)
    thread.start()
    while thread.is_alive():
        steps_us.append(decoder.step())
    thread.join()
    if failed:
        raise RuntimeError(f"moving layers beside decode failed: {failed[0]}") from failed[0]
    return took[0]
