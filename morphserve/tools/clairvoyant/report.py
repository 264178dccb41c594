"""What policies cost beyond the best run found, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from morphserve.config import MorphServeConfig
from morphserve.tools.clairvoyant.frontier import Frontier, Point
from morphserve.tools.clairvoyant.search import SearchOptions, search
from morphserve.tools.clairvoyant.world import World
from morphserve.tools.tables import markdown_table

_SHARES = (0.0, 0.01, 0.05)  # late requests, of those sent: points of the frontier beside the policies' own


@dataclass(frozen=True, slots=True)
class Findings:
    """The best runs found, and the policies beside them."""

    frontier: Frontier
    policies: tuple[Point, ...]
    num_requests: int
    num_runs: int
    options: SearchOptions
    seed: int

    def best(self, policy: Point) -> Point:
        """Return the cheapest run found with no more late requests than a policy has."""
        return self.frontier.best(policy.late)

    def document(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {
            "what": "best schedule found knowing the future",
            "runs": self.num_runs,
            "chunk_s": self.options.clairvoyant_chunk_s,
            "seed": self.seed,
            "frontier": [self._row(point) | {"schedule": point.schedule.document()} for point in self.frontier],
            "policies": [
                self._row(policy)
                | {
                    "regret": policy.kl - self.best(policy).kl,
                    "best": self._row(self.best(policy)),
                    "schedule": policy.schedule.document(),
                }
                for policy in self.policies
            ],
        }

    def _row(self, point: Point) -> dict[str, Any]:
        return {
            "name": point.source,
            "late": point.late,
            "violation_rate": point.late / self.num_requests,
            "expected_kl_per_token": point.kl,
            "nats_by_level": {str(level): round(nats, 3) for level, nats in point.nats.items() if nats},
        }


def find(
    world: World, policies: Mapping[str, MorphServeConfig | None], options: SearchOptions, seed: int = 0
) -> Findings:
    """Run the policies, and search for what they could have cost.

    Args:
        world: whose levels are searched.
        policies: by name; None = stock vLLM.
        options: how long is searched.
        seed: of the search.
    """
    ran = [world.run_policy(config, name) for name, config in policies.items()]
    points = tuple(point for point, _ in ran)
    full, _ = world.run_policy(None, "level 0")
    num_requests = len(world.workload.requests)
    targets = [*(point.late for point in points), *(int(share * num_requests) for share in _SHARES)]
    # With as many late as without any quantized layer, nothing need be searched for: it costs nothing.
    wanted = [late for late in targets if late < full.late]
    end_s = max((end for point, end in ran if point.schedule.levels != (0,)), default=world.workload.span_s)
    frontier = search(world, points, wanted, end_s, options, seed)
    return Findings(frontier, points, num_requests, world.num_runs, options, seed)


def text_of(findings: Findings) -> str:
    """Return the findings in Markdown."""
    percent = 100.0 / findings.num_requests
    rows = [
        (
            policy.source, f"{policy.late * percent:.1f} %", f"{policy.kl:.4f}", f"{best.late * percent:.1f} %",
            f"{best.kl:.4f}", f"{policy.kl - best.kl:.4f}", _levels(policy), _levels(best),
        )
        for policy in findings.policies
        for best in (findings.best(policy),)
    ]  # fmt: skip
    head = ("run", "late", "nats/token", "best late", "best nats/token", "regret", "its nats", "best's nats")
    lines = [
        "# Best schedule found knowing the future",
        "",
        f"{findings.num_runs} simulated runs, changes at multiples of {findings.options.clairvoyant_chunk_s:g} s, seed "
        f"{findings.seed}. Each can be done on this server by who knows all that will come; cheaper ones may exist, so "
        "a regret is at least what stands here.",
        "",
        *markdown_table(head, rows),
        "",
        "Nats: expected KL summed over the tokens of each level.",
        "",
        *markdown_table(
            ("late", "nats/token", "what", "changes of level"),
            [
                (f"{p.late * percent:.1f} %", f"{p.kl:.4f}", p.source, str(len(p.schedule.levels) - 1))
                for p in findings.frontier
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def _levels(point: Point) -> str:
    return ", ".join(f"{level}: {nats:.0f}" for level, nats in sorted(point.nats.items()) if round(nats)) or "0"
