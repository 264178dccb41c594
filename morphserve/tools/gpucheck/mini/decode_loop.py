"""Something that runs like a decode step: weights of a few gigabytes read once a step, one graph, one wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from morphserve.tools.gpucheck.bench import Bench
from morphserve.tools.gpucheck.device import Mark, capture, random_weight


@dataclass(slots=True)
class Steps:
    """Times of steps, in microseconds."""

    wall_us: list[float] = field(default_factory=list)  # from launch to the return of the wait, as a server sees it
    device_us: list[float] = field(default_factory=list)  # between two events around the replay


class DecodeLoop:
    """Pairs of matmuls [B, H] -> [B, I] -> [B, H] over distinct weights, captured as one graph."""

    def __init__(self, bench: Bench) -> None:
        hidden, inner, pairs = bench.pick((4096, 14336, 24), (32, 64, 2))  # 5.6 GB of bf16
        self._device = bench.device
        self._weights = [
            (random_weight(inner, hidden, bench.device, 2 * i), random_weight(hidden, inner, bench.device, 2 * i + 1))
            for i in range(pairs)
        ]
        self._x = random_weight(hidden, 16, bench.device, 99).t().contiguous()
        self.out = torch.zeros_like(self._x)
        self._replay = capture(bench.device, self._work)

    @property
    def weight_bytes(self) -> int:
        """Read in each step."""
        return sum(weight.nbytes for pair in self._weights for weight in pair)

    def _work(self) -> None:
        x = self._x
        for up, down in self._weights:
            x = x + torch.nn.functional.linear(torch.nn.functional.linear(x, up), down)
            x = torch.nn.functional.normalize(x, dim=-1)
        self.out.copy_(x)

    def run(self, num_steps: int, before: Callable[[], None] | None = None) -> Steps:
        """Make steps one after the other; each is waited for, as a sampled token is.

        Args:
            num_steps: how many.
            before: called ahead of each, outside of its time.
        """
        steps = Steps()
        for _ in range(num_steps):
            if before is not None:
                before()
            start = time.perf_counter()
            first = Mark(self._device)
            self._replay()
            last = Mark(self._device)
            last.wait()
            steps.wall_us.append((time.perf_counter() - start) * 1e6)
            steps.device_us.append(last.us_since(first))
        return steps


@dataclass(slots=True)
class Comparison:
    """Steps with and without something beside them, in blocks that take turns."""

    quiet: Steps = field(default_factory=Steps)
    beside: Steps = field(default_factory=Steps)
    ratios: list[float] = field(default_factory=list)  # of the medians of two neighbouring blocks

    def add(self, quiet: Steps, beside: Steps) -> None:
        """Add one block of each."""
        for all_steps, block in ((self.quiet, quiet), (self.beside, beside)):
            all_steps.wall_us += block.wall_us
            all_steps.device_us += block.device_us
        self.ratios.append(_median(beside.wall_us) / _median(quiet.wall_us))

    def report(self, bench: Bench, what: str) -> None:
        """Figures, and whether there was a stall: a step that took twice the longest quiet one."""
        bench.figure(f"step, quiet, in turn with {what}", "us", self.quiet.wall_us)
        bench.figure(f"step beside {what}", "us", self.beside.wall_us)
        bench.figure(f"step beside {what}, on the device", "us", self.beside.device_us)
        bench.figure(f"slowdown by {what}, medians of neighbouring blocks", "ratio", self.ratios)
        longest_quiet, longest = max(self.quiet.wall_us), max(self.beside.wall_us)
        if not bench.dry:
            detail = f"longest step {longest:.0f} us beside it, {longest_quiet:.0f} us without"
            bench.expect(f"no stall by {what}", longest <= 2 * longest_quiet, detail)


def compare(
    bench: Bench, loop: DecodeLoop, seconds: float, beside: Callable[[int], Steps], num_steps: int
) -> Comparison:
    """Blocks of quiet steps and of steps beside something, in alternating order, for `seconds`.

    Args:
        bench: its budget ends the comparison, too.
        loop: makes the quiet steps.
        seconds: to spend; two blocks of each are made in any case.
        beside: makes that many steps beside the thing.
        num_steps: of a block.
    """
    found = Comparison()
    end = time.monotonic() + min(seconds, bench.left_s)
    turn = 0
    while turn < 2 or (time.monotonic() < end and not (bench.dry and turn >= 3)):
        if turn % 2:
            disturbed = beside(num_steps)
            quiet = loop.run(num_steps)
        else:
            quiet = loop.run(num_steps)
            disturbed = beside(num_steps)
        found.add(quiet, disturbed)
        turn += 1
    return found


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
