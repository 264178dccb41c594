"""T3: copies from pinned memory on a side stream, alone and beside decode: what each costs the other.

The sizes: two chunks, a Llama-8B layer in 4 bits, and one in bf16.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.device import MIB, Mark, on_stream, pinned, require_device, side_stream, synchronize
from morphserve.tools.gpucheck.mini.decode_loop import DecodeLoop, Steps, compare

_SIZES = (8 * MIB, 16 * MIB, 112_500_000, 436_207_616)
_DRY_SIZES = (4096, 16384)
_IN_FLIGHT = 3  # copies queued at a time: the next begins when one ends, whatever the host does meanwhile


def run(bench: Bench) -> None:
    """See the module."""
    require_device(bench)
    sizes = bench.pick(_SIZES, _DRY_SIZES)
    start = time.perf_counter()
    source = pinned(max(sizes), bench.device)
    bench.figure("pin host memory", "MiB/s", source.nbytes / MIB / (time.perf_counter() - start))
    source.random_(0, 256)
    target = torch.zeros(max(sizes), dtype=torch.uint8, device=bench.device)
    loop = DecodeLoop(bench)
    loop.run(bench.pick(200, 2))
    reference = loop.out.clone()
    stream = side_stream(bench.device)
    alone = {size: _alone(bench, source, target, stream, size) for size in sizes}
    for number, size in enumerate(sizes):
        copier = Copier(bench.device, source, target, stream, size)

        def beside(num_steps: int, copier: Copier = copier) -> Steps:
            steps = loop.run(num_steps, before=copier.feed)
            copier.drain()
            return steps

        seconds = bench.left_s * 0.9 / (len(sizes) - number)
        found = compare(bench, loop, seconds, beside, bench.pick(60, 3))
        found.report(bench, f"copies of {_name(size)}")
        rate = bench.figure(f"copy of {_name(size)} beside decode", "GB/s", copier.rates)
        if not bench.dry:
            kept = rate.median / alone[size]
            bench.expect(f"copies of {_name(size)} keep 80 % of their speed", kept >= 0.8, f"{kept:.2f} of it alone")
    loop.run(1)
    bench.require("the loop computes what it did before", bool((loop.out == reference).all()), "bit by bit")
    bench.require("what was copied arrived", torch.equal(target.cpu(), source), f"{source.nbytes:,} B")


def _name(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size >= MIB else f"{size} B"


def _alone(bench: Bench, source: torch.Tensor, target: torch.Tensor, stream: Any, size: int) -> float:
    """Median GB/s with nothing else running."""
    copier = Copier(bench.device, source, target, stream, size)
    for _ in range(bench.pick(max(10, 400_000_000 // size), 3)):
        copier.feed()
        copier.drain()
    return bench.figure(f"copy of {_name(size)} alone", "GB/s", copier.rates).median


@dataclass(slots=True)
class Copier:
    """Keeps a few copies queued on a stream and times each on the device."""

    device: str
    source: torch.Tensor
    target: torch.Tensor
    stream: Any
    size: int
    rates: list[float] = field(default_factory=list)  # GB/s
    _queued: list[tuple[Mark, Mark]] = field(default_factory=list)

    def feed(self) -> None:
        """Queue as many as are missing."""
        while self._queued and self._queued[0][1].passed:
            self._finish()
        with on_stream(self.stream):
            while len(self._queued) < _IN_FLIGHT:
                first = Mark(self.device)
                self.target[: self.size].copy_(self.source[: self.size], non_blocking=True)
                self._queued.append((first, Mark(self.device)))

    def drain(self) -> None:
        """Wait for all of them."""
        while self._queued:
            self._finish()
        synchronize(self.device)

    def _finish(self) -> None:
        first, last = self._queued.pop(0)
        last.wait()
        self.rates.append(self.size / max(last.us_since(first), 1e-3) / 1e3)
