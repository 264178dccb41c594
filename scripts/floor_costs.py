"""What do requests that hold the level up cost the others? Simulated: one share of them and one budget a row.

Every window is sent for each share of requests that ask for level 0, spread evenly, for each budget, and for both that
may come when it is spent.

Output columns: share of the requests that ask, seconds an hour that they may hold, what comes then; the requests late
in % of those that do not ask and of those that do and are taken; refused ones in % of those that do; nats per token of
those that do not ask, and of those that do.
Last stdout line: one JSON document {"rows": [{...}]}.

    python scripts/floor_costs.py --step-times docs/results/step_times.json --shares 0 0.02 0.1 --hold 0 60 3600
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from morphserve.config import MorphServeConfig, parse_config
from morphserve.shipped import workload_file
from morphserve.tools.command import command_parser, finish, say
from morphserve.tools.sim import Calibration, SimServer, Simulated, load_calibration, simulate
from morphserve.tools.workload import Slo, Workload, WorkloadSpec, load_workload

_WINDOWS = ("convD", "convE", "conv593", "hybA", "hybB", "hybC")
_LADDER = {
    "steps": [{"format": "w8", "layers_per_level": 30}, {"format": "w4", "layers_per_level": 10}],
    "expected_kl": {"w8": 0.0289, "w4": 0.3061},
}


@dataclass
class _Sum:
    """Requests of one kind, over all windows."""

    sent: int = 0
    refused: int = 0
    late: int = 0
    tokens: int = 0
    nats: float = 0.0

    @property
    def figures(self) -> tuple[float | None, float | None]:
        """Of those that were taken the late ones in %, and nats per token; None without requests."""
        taken = self.sent - self.refused
        return 100 * self.late / taken if taken else None, self.nats / self.tokens if self.tokens else None

    @property
    def refused_share(self) -> float | None:
        """Those that were refused in %; None without requests."""
        return 100 * self.refused / self.sent if self.sent else None


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    calibration = load_calibration(args.step_times)
    workloads = [load_workload(WorkloadSpec(workload_file(f"{name}.jsonl"))) for name in _WINDOWS]
    say(
        "| ask | hold (s/h) | then | others late (%) | askers late (%) | refused (%) "
        "| others' nats/token | askers' nats/token |"
    )
    say("|---|---|---|---|---|---|---|---|")
    rows = []
    for share in args.shares:
        for hold_s, then in product(args.hold, args.then) if share else [(None, None)]:
            sums = {False: _Sum(), True: _Sum()}
            for workload in workloads:
                _add(sums, workload, _config(hold_s or 0.0, then or "wait"), calibration, share, args.speed)
            (late, nats), (own_late, own_nats) = sums[False].figures, sums[True].figures
            refused = sums[True].refused_share
            row = {"share": share, "hold_s": hold_s, "then": then, "late": late, "own_late": own_late}
            rows.append(row | {"own_refused": refused, "nats": nats, "own_nats": own_nats})
            cells = [f"{share:.0%}", "" if hold_s is None else f"{hold_s:g}", then or ""]
            figures = [*map(_cell, (late, own_late, refused), "111"), *map(_cell, (nats, own_nats), "44")]
            say("| " + " | ".join([*cells, *figures]) + " |")
    return finish({"rows": rows})


def _add(
    sums: dict[bool, _Sum], workload: Workload, config: MorphServeConfig, calibration: Calibration, share: float,
    speed: float,
) -> None:
    """Send one window, and count its requests by whether they ask."""

    def asks(index: int) -> bool:
        return int((index + 1) * share) > int(index * share)

    server = SimServer(num_blocks=49, block_size=32, max_model_len=512)
    done = simulate(
        workload, server, config, calibration, speed=speed, asking=lambda index: 0 if asks(index) else None
    )
    slo, refused = Slo(), {request.index for request in done.refused}
    for request, outcome, nats in zip(done.requests, done.outcomes, _nats(done), strict=True):
        found = sums[asks(request.index)]
        found.sent += 1
        found.refused += request.index in refused
        found.late += request.index not in refused and not slo.good(outcome)
        found.tokens += request.generated
        found.nats += nats


def _nats(done: Simulated) -> list[float]:
    """Return, by request, what its tokens were measured to cost at the levels of their steps."""
    costs = [level["expected_kl"] or 0.0 for level in (done.status or {"ladder": []})["ladder"]]
    return [
        sum(costs[level] for first, count in request.runs for level in done.levels[first : first + count])
        for request in done.requests
    ]


def _config(hold_s: float, then: str) -> MorphServeConfig:
    floors = {"shallowest": 0, "hold_s": hold_s, "when_spent": then}
    return parse_config({"prepared": False, "ladder": _LADDER, "policy": {"kind": "slo", "floors": floors}})


def _cell(value: float | None, digits: str) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, "floor_costs.py")
    parser.add_argument("--step-times", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.02, 0.1, 0.3])
    parser.add_argument("--hold", type=float, nargs="+", default=[0.0, 60.0, 3600.0])
    parser.add_argument("--then", nargs="+", choices=("wait", "refuse"), default=["wait", "refuse"])
    parser.add_argument("--speed", type=float, default=1.0, help="all step times are multiplied by it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
