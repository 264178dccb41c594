"""A burst that hurts a stock server on this machine, and limits that mean the same on any.

Limits are multiples of what a lone request takes; the load is the lightest at which stock, simulated with the step
times that were measured, has many requests late. Whether a morphing server holds that load is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from morphserve.control import RankBytes
from morphserve.tools.bench.load.probe import StockSpeed
from morphserve.tools.sim import Calibration, SimServer, simulate
from morphserve.tools.workload import Slo, WorkloadSpec, load_workload
from policies import BASE_FORMAT, LayerMove, StepTimes

# What 2 s and 150 ms are to a lone request of 40 prompt tokens on the VNNI machine of docs/results/step_times.json: it
# takes 36 ms to the first token, 13.4 ms to each further one.
TTFT_OF_LONE = 55.0
TPOT_OF_LONE = 11.0

# A run goes on behind its last arrival for as long as a lone request of the longest answer takes twice, which a server
# that keeps up needs; what still waits then is late by any limit. At least a minute, for there is noise.
_LONGEST_TIMES = 2.0
_LEAST_CUTOFF_S = 60.0

# A burst of which a fifth are late hurts. Machines are not steady, so twice as many must be, and also where the steps
# of the run are a fifth faster than those that were measured.
_LATE = 0.4
_FASTER = 0.8
_THINS = (8.0, 6.0, 5.0, 4.0, 3.5, 3.0, 2.5, 2.0, 1.75, 1.5, 1.25)
_RATES = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0)


@dataclass(frozen=True, slots=True)
class Given:
    """What the user has set, which is left as it is; None = to be fitted."""

    thin: float | None = None
    rate_scale: float | None = None
    slo_ttft_s: float | None = None
    slo_tpot_ms: float | None = None
    cutoff_s: float | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """A load and limits for one machine."""

    thin: float
    rate_scale: float
    slo: Slo
    speed: StockSpeed
    cutoff_s: float  # after the last arrival
    late: float  # share of stock's requests, simulated with steps a fifth faster
    num_requests: int
    num_all: int  # of the workload as it was given
    is_given: bool = False  # the load, by the user: no other was tried

    def document(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {
            "thin": self.thin,
            "rate_scale": self.rate_scale,
            "slo_ttft_s": self.slo.ttft_s,
            "slo_tpot_ms": round(1000 * self.slo.tpot_s, 3),
            "cutoff_s": self.cutoff_s,
            "lone_ttft_s": round(self.speed.lone_ttft_s, 5),
            "lone_tpot_s": round(self.speed.lone_tpot_s, 6),
            "offset_s": round(self.speed.offset_s, 6),
            "step": asdict(self.speed.step),
            "stock_late_simulated": round(self.late, 4),
        }

    def sentence(self, machine: str) -> str:
        """Say what was fitted, to what, and how to have it again.

        Args:
            machine: its name, for people.
        """
        lone = self.speed
        if self.thin > 1:
            load = f"{self.num_requests} of {self.num_all} requests"
        elif self.rate_scale > 1:
            load = f"all {self.num_requests} requests, {self.rate_scale:g} times as fast"
        else:
            load = f"all {self.num_requests} requests at their own times"
        again = f"--thin {self.thin:g} --rate-scale {self.rate_scale:g}"
        return self._warning() + (
            f"Fitted to {machine or 'this machine'}, where a lone request takes {lone.lone_ttft_s:.2g} s to its first "
            f"token and {1000 * lone.lone_tpot_s:.3g} ms to each further one: limits TTFT {self.slo.ttft_s:g} s, TPOT "
            f"{1000 * self.slo.tpot_s:g} ms; {load} (stock simulated with steps a fifth faster: {self.late:.0%} late). "
            f"The same again, instead of --fit: {again} --slo-ttft-s {self.slo.ttft_s:g} "
            f"--slo-tpot-ms {1000 * self.slo.tpot_s:g} --cutoff {self.cutoff_s:g}"
        )

    def _warning(self) -> str:
        if self.late >= _LATE:
            return ""
        found = f"{self.late:.0%} of stock's requests are late, {_LATE:.0%} were wanted"
        if self.is_given:
            return f"WARNING: the load that was given is light for this machine: {found}. Leave it to --fit. "
        return (
            f"WARNING: this machine is too fast for this window: at the heaviest load that was tried {found}, so a "
            "comparison may show little. Give a --workload of longer or more requests. "
        )


def fit(spec: WorkloadSpec, given: Given, server: SimServer, speed: StockSpeed) -> Fit:
    """Find limits and load for a machine.

    Args:
        spec: the workload; its thinning and rate are those that the user gave, or none.
        server: what the stock server has: KV blocks, limits of the batch.
        speed: of its steps, measured.

    Raises:
        ConfigError, WorkloadError: what the server would refuse.
    """
    slo = Slo(
        _rounded(TTFT_OF_LONE * speed.lone_ttft_s) if given.slo_ttft_s is None else given.slo_ttft_s,
        _rounded(TPOT_OF_LONE * speed.lone_tpot_s) if given.slo_tpot_ms is None else given.slo_tpot_ms / 1000.0,
    )
    whole = load_workload(replace(spec, thin=1.0)).requests
    cutoff_s = given.cutoff_s
    if cutoff_s is None:
        longest_s = max(request.output_tokens for request in whole) * speed.lone_tpot_s
        cutoff_s = max(_rounded(slo.ttft_s + _LONGEST_TIMES * longest_s), _LEAST_CUTOFF_S)
    server = replace(server, cutoff_s=cutoff_s)
    best: Fit | None = None
    for thin, rate_scale in _loads(given):
        found = _at(replace(spec, thin=thin, rate_scale=rate_scale), slo, server, speed)
        if best is None or found.late > best.late:
            best = found
        if found.late >= _LATE:
            break
    assert best is not None
    is_given = given.thin is not None or given.rate_scale is not None
    return replace(best, is_given=is_given, num_all=len(whole))


def _loads(given: Given) -> Iterator[tuple[float, float]]:
    """Yield (thinning, rate) from the lightest to the heaviest; only what the user gave, if anything.

    A slow machine gets fewer requests at the same times: slowing them would make the run long. A fast one gets them in
    less time, which leaves everything as it is but the clock.
    """
    if given.thin is not None or given.rate_scale is not None:
        yield given.thin or 1.0, given.rate_scale or 1.0
        return
    yield from ((thin, 1.0) for thin in (*_THINS, 1.0))
    yield from ((1.0, rate) for rate in _RATES)


def _at(spec: WorkloadSpec, slo: Slo, server: SimServer, speed: StockSpeed) -> Fit:
    times = StepTimes({BASE_FORMAT: speed.step}, LayerMove(0.0, 0.0), speed.offset_s)
    stock = Calibration(times, RankBytes({BASE_FORMAT: (1,)}, server.block_size), 1, server.block_size)
    workload = load_workload(spec)
    late = simulate(workload, server, None, stock, speed=_FASTER).violation_rate(slo)
    num = len(workload.requests)
    return Fit(spec.thin, spec.rate_scale, slo, speed, server.cutoff_s, late, num, num)


def _rounded(value: float) -> float:
    """Round to two significant digits: a limit that people can read."""
    digits = 1 - math.floor(math.log10(value))
    return round(value, digits)
