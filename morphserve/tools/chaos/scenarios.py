"""Every scenario, a row each: what is done, and what the server may do about it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from morphserve.tools.chaos import faults
from morphserve.tools.chaos.faults import Stage


@dataclass(frozen=True, slots=True)
class Scenario:
    """One way to break things."""

    name: str
    fault: Callable[[Stage], Awaitable[None]]
    max_warnings: int = 1  # lines of ours at WARNING or above, for the whole scenario: one an attempt that fails
    is_short: bool = False  # runs in the gate
    ends: bool = False  # the server must end by itself, and say why
    own_server: bool = False  # nobody runs after it
    fails_in_libc: bool = False  # with the library of `libraries`
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the YAML, beside the common ones

    @property
    def alone(self) -> bool:
        """Whether it needs a server that no other scenario has had, or will have."""
        return self.ends or self.own_server or self.fails_in_libc or bool(self.settings)

    @property
    def question(self) -> str:
        """What is done, in a line."""
        return (self.fault.__doc__ or "").splitlines()[0]


SCENARIOS = (
    Scenario("nothing", faults.nothing, max_warnings=0),
    Scenario("disconnects", faults.disconnects, max_warnings=0, is_short=True),
    Scenario("hostile-limits", faults.hostile_limits, max_warnings=40),  # each bad value is told of
    Scenario("receipts", faults.many_receipts, max_warnings=0),
    Scenario("features", faults.all_features, max_warnings=0),
    Scenario("flood", faults.flood, max_warnings=0),
    Scenario("frozen-rank", faults.frozen_rank, max_warnings=2, is_short=True),
    Scenario("frozen-core", faults.frozen_core, max_warnings=2),
    Scenario("hangup", faults.hangup, max_warnings=0),
    Scenario("resets", faults.resets, max_warnings=6),
    Scenario("damaged-yaml", faults.damaged_yaml, max_warnings=6),
    Scenario("full-disk", faults.small_files, own_server=True, settings={"decision_log": "{directory}/log.jsonl"}),
    Scenario("memory-limit", faults.no_more_memory, own_server=True),
    Scenario("madvise", faults.failing_madvise, max_warnings=4, fails_in_libc=True),
    Scenario("changed-cache", faults.changed_cache, max_warnings=6, settings={"cache_dir": "{directory}/cache"}),
    Scenario("removed-cache", faults.removed_cache, max_warnings=6, settings={"cache_dir": "{directory}/cache"}),
    Scenario("killed-rank", faults.killed_rank, ends=True),
    Scenario("killed-core", faults.killed_core, ends=True),
)
