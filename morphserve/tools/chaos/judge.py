"""What must hold of a server to which something was done, and what of it did not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from morphserve.tools.chaos.load import Traffic
from morphserve.tools.chaos.scenarios import Scenario
from morphserve.tools.workload import Snapshot

RESTORED_WITHIN_S = 30.0
_REFUSED = "http_503"  # what the documentation says of a door that is closed
_WARNING = re.compile(r"(?:WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]{8} \[[^\]]*\] (?P<text>morph.*)")
_MAX_SHOWN = 3


@dataclass(slots=True)
class Seen:
    """A scenario, as seen from outside. `log` is what the server said from its beginning on."""

    traffic: Traffic
    snapshots: Sequence[Snapshot] = ()
    log: str = ""
    statuses: list[Mapping[str, Any]] = field(default_factory=list)  # now and then, all the time
    status: Mapping[str, Any] | None = None  # of the server at rest; None: it does not answer
    restored_s: float | None = None  # from the end of fault and load to level 0; None: not seen
    fault_s: float = 0.0  # when the fault began, by the traffic's clock
    fault_error: str = ""  # what the fault itself met
    exit_ended: bool = False  # the server's process ended by itself, or at SIGTERM
    left_over: Sequence[str] = field(default_factory=list)  # command lines of processes that outlived it

    @property
    def warnings(self) -> list[str]:
        """Lines of ours at WARNING and above."""
        return [match["text"] for match in _WARNING.finditer(self.log)]


def judge(scenario: Scenario, seen: Seen, reference: Mapping[int, tuple[int, ...]]) -> list[str]:
    """Return what does not hold, a sentence each; none = all holds.

    Args:
        reference: tokens of the canaries whose answer a stock server does not change under load, by prompt.
    """
    found = [*_some(_answers(scenario, seen)), *_some(_canaries(seen, reference)), *_blocks(seen), *_ledgers(seen)]
    if seen.fault_error:
        found.append(seen.fault_error)
    if not scenario.ends:
        found += _rest(seen)
    elif "morphserve: error: " not in seen.log:
        found.append("the server ended without a last line that says why")
    if len(seen.warnings) > scenario.max_warnings:
        some = " | ".join(seen.warnings[:_MAX_SHOWN])
        found.append(f"{len(seen.warnings)} warnings, {scenario.max_warnings} allowed: {some}")
    if not seen.exit_ended:
        found.append("the server did not end in time")
    if seen.left_over:
        found.append(f"{len(seen.left_over)} processes outlived the server: {seen.left_over[0][:80]}")
    return found


def _some(found: Iterator[str]) -> list[str]:
    """Return the first few of what is found by the hundred once a server is gone, and how many more there are."""
    first, rest = list(itertools.islice(found, _MAX_SHOWN)), sum(1 for _ in found)
    return [*first, f"and {rest} more like that"] if rest else first


def _answers(scenario: Scenario, seen: Seen) -> Iterator[str]:
    """Find requests that lack tokens, were not refused as documented, and did not meet the end that is asked about."""
    for outcome in seen.traffic.outcomes:
        if outcome.ok or outcome.status == _REFUSED:
            continue
        if scenario.ends and (outcome.ended_s or 0.0) >= seen.fault_s:
            continue
        got = f"{outcome.status}, {outcome.output_tokens} of {outcome.asked_tokens} tokens"
        yield f"request {outcome.index}: {got}: {outcome.error[:120]}"


def _canaries(seen: Seen, reference: Mapping[int, tuple[int, ...]]) -> Iterator[str]:
    for answer in seen.traffic.canaries:
        if answer.status == "ok" and answer.levels is None:
            yield f"canary {answer.prompt}: no receipt"
        elif answer.is_mixed or answer.levels != {0} or answer.prompt not in reference:
            continue
        elif answer.tokens != reference[answer.prompt]:
            yield f"canary {answer.prompt}: other tokens at level 0 than stock's"


def _blocks(seen: Seen) -> Iterator[str]:
    for snapshot in seen.snapshots:
        published, backed = snapshot.blocks_published, snapshot.blocks_backed
        if published is not None and backed is not None and published > backed:
            yield f"at {snapshot.t_s:.1f} s {published} blocks are published, {backed} backed"
            return


def _ledgers(seen: Seen) -> Iterator[str]:
    """Hold what is booked, and what ranks say that they have, against the budget of each."""
    for status in seen.statuses:
        for rank, ledger in enumerate(status["ledgers"]):
            booked = sum(amount for account, amount in ledger.items() if account != "budget_bytes")
            held = _held_bytes(status["ranks"].get(str(rank)), status["kv_block_bytes"])
            if max(booked, held) > (budget := ledger["budget_bytes"]):
                yield f"rank {rank} has {booked:,} bytes booked and holds {held:,}, its budget is {budget:,}"
                return


def _held_bytes(rank: Mapping[str, int] | None, kv_block_bytes: int) -> int:
    if rank is None:  # it has answered no command yet
        return 0
    return rank["weight_bytes"] + rank["staging_bytes"] + rank["num_kv_blocks"] * kv_block_bytes


def _rest(seen: Seen) -> Iterator[str]:
    """Look at the server at rest: it is at level 0, whole, and decides."""
    status = seen.status
    if status is None:
        yield "the server does not answer after it"
        return
    if seen.restored_s is None:
        yield f"level {status['level']}, not 0, {RESTORED_WITHIN_S:.0f} s after the end of fault and load"
    elif status["num_kv_blocks"] != status["ladder"][0]["num_kv_blocks"]:
        blocks, at_start = status["num_kv_blocks"], status["ladder"][0]["num_kv_blocks"]
        yield f"{blocks} blocks at level {status['level']}, {at_start} at start"
    elif set(status["layers_by_format"]) != {"base"}:
        yield f"layers at level 0 are {status['layers_by_format']}"
    if staged := sum(ledger["staging_bytes"] for ledger in status["ledgers"]):
        yield f"{staged:,} bytes are staged, and nothing is under way"
    if status["failed"]:
        yield "the controller has failed"
    if status["num_running"] or status["num_waiting"]:
        yield f"{status['num_running']} requests run and {status['num_waiting']} wait, and nobody asks"


def figures(seen: Seen) -> dict[str, Any]:
    """Count what was seen, for the report."""
    at_zero = [answer for answer in seen.traffic.canaries if answer.levels == {0}]
    before = seen.statuses[0]["transitions"] if seen.statuses else {}
    after = (seen.status or {}).get("transitions", {})
    transitions = {name: count - before.get(name, 0) for name, count in after.items()}
    return {
        "requests": len(seen.traffic.outcomes),
        "answered": sum(outcome.ok for outcome in seen.traffic.outcomes),
        "refused": sum(outcome.status == _REFUSED for outcome in seen.traffic.outcomes),
        "canaries": len(seen.traffic.canaries),
        "canaries_at_level_0": len(at_zero),
        "deepest_level": max((snapshot.level or 0 for snapshot in seen.snapshots), default=0),
        "transitions": {name: count for name, count in transitions.items() if count},
        "restored_s": None if seen.restored_s is None else round(seen.restored_s, 1),
        "num_warnings": len(seen.warnings),
        "warnings": seen.warnings[:_MAX_SHOWN],
    }
