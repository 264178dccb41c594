"""Every scenario, a row each: what is done, and what the server may do about it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from morphserve.tools.chaos.faults import Fault, clients, files, nothing, operators, signals, system

_OWN_CACHE: Mapping[str, Any] = {"cache_dir": "{directory}/cache"}
# Who asks not to be served below a level holds others up for seconds, then waits; strict limits likewise.
_SLO: Mapping[str, Any] = {
    "policy": {
        "kind": "slo", "ttft_s": 1.0, "tpot_s": 0.5, "limits_hold_s": 2.0, "floors": {"shallowest": 0, "hold_s": 2.0},
    }
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scenario:
    """One way to break things."""

    name: str
    fault: Fault
    max_warnings: int = 0  # lines of ours at WARNING or above, for the whole scenario: one a fault, none for no fault
    is_short: bool = False  # runs in the gate
    ends: bool = False  # the server must end by itself, and say why
    leaves_damage: bool = False  # nobody runs after it on its server
    has_library: bool = False  # the one of `libraries`
    full_at_start: bool = False  # its first start meets a full disk below the cache, and must say so
    num_ranks: int = 1  # tensor-parallel
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the YAML, beside the common ones
    serve_args: tuple[str, ...] = ()  # more, of vllm serve; stock's too
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def server(self) -> tuple[object, ...]:
        """What its server must be like: scenarios with the same may share one."""
        settings = json.dumps(self.settings, sort_keys=True)
        return self.has_library, self.full_at_start, self.num_ranks, settings, self.serve_args, self.environment

    @property
    def is_last(self) -> bool:
        """Whether its server is of no use after it."""
        return self.ends or self.leaves_damage

    @property
    def question(self) -> str:
        """What is done, in a line."""
        return (self.fault.__doc__ or "").splitlines()[0]


def by_server(scenarios: Iterable[Scenario]) -> list[list[Scenario]]:
    """Return them by the server that they share, in their order; what is of no use after one of them begins anew."""
    groups: dict[object, list[list[Scenario]]] = {}
    for each in sorted(scenarios, key=lambda scenario: scenario.is_last):
        shared = groups.setdefault(each.server, [[]])
        if shared[-1] and shared[-1][-1].is_last:
            shared.append([])
        shared[-1].append(each)
    return [group for shared in groups.values() for group in shared]


SCENARIOS = (
    Scenario("nothing", nothing),
    Scenario("disconnects", clients.disconnects, is_short=True),
    # Each of the four words that can be of no sense is told of once, however often it comes.
    Scenario("hostile-limits", clients.hostile_limits, max_warnings=4),
    Scenario("hostile-limits-slo", clients.held_requests, max_warnings=4, settings=_SLO),
    Scenario("receipts", clients.many_receipts),
    Scenario("features", clients.all_features),
    Scenario("flood", clients.flood),
    Scenario("priorities", clients.priorities, serve_args=("--scheduling-policy", "priority")),
    Scenario(
        "adapters", clients.adapters, serve_args=("--enable-lora", "--max-lora-rank", "8", "--max-loras", "3"),
        environment=(("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1"),),
    ),
    Scenario("frozen-rank", signals.frozen_rank, max_warnings=2, is_short=True),
    Scenario("frozen-core", signals.frozen_core, max_warnings=2),
    Scenario("frozen-phases", signals.frozen_phases, max_warnings=3, has_library=True),
    Scenario("hangup", signals.hangup),
    Scenario("resets", operators.resets),
    Scenario("pauses", operators.pauses),
    Scenario("drains", operators.drains, max_warnings=2),  # it shuts the door twice, and says so
    Scenario("damaged-yaml", files.damaged_yaml, max_warnings=5),  # of six ways the empty one is waited for
    Scenario("full-disk", system.small_files, max_warnings=1),
    Scenario("full-cache", nothing, has_library=True, full_at_start=True, settings=_OWN_CACHE),
    Scenario("slow-disk", files.slow_disk, has_library=True),
    Scenario("hung-disk", files.hung_disk, max_warnings=1, has_library=True),
    Scenario("memory-limit", system.no_more_memory, max_warnings=1),
    Scenario("madvise", system.failing_release, max_warnings=1, has_library=True),
    Scenario("populate", system.failing_populate, max_warnings=1, has_library=True),
    Scenario("mmap", system.failing_mmap, max_warnings=1, has_library=True),
    Scenario("clock-jumps", system.clock_jumps, has_library=True),
    Scenario("changed-cache", files.changed_cache, max_warnings=1, leaves_damage=True, settings=_OWN_CACHE),
    Scenario("cut-cache", files.cut_cache, max_warnings=1, leaves_damage=True, settings=_OWN_CACHE),
    Scenario("removed-cache", files.removed_cache, max_warnings=1, leaves_damage=True, settings=_OWN_CACHE),
    Scenario("damaged-while-away", files.damaged_while_away, max_warnings=1, settings=_OWN_CACHE),
    Scenario("killed-rank", signals.killed_rank, max_warnings=1, ends=True),
    Scenario("killed-core", signals.killed_core, max_warnings=1, ends=True),
    Scenario("two-ranks-frozen", signals.frozen_phases, max_warnings=3, has_library=True, num_ranks=2),
    Scenario("two-ranks-killed", signals.killed_rank, max_warnings=1, ends=True, has_library=True, num_ranks=2),
)
