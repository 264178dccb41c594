"""What `morphserve chaos` calls broken: each thing that must hold, not holding once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morphserve.tools.chaos import processes
from morphserve.tools.chaos.judge import Seen, figures, judge
from morphserve.tools.chaos.load import CanaryAnswer, Traffic
from morphserve.tools.chaos.scenarios import SCENARIOS, Scenario
from morphserve.tools.workload import OK, Snapshot

pytestmark = pytest.mark.cpu

REFERENCE = {0: (1, 2, 3)}
WARNING = "(EngineCore pid=7) WARNING 11-24 23:00:00 [controller.py:80] morph r3: rank 0 did not prepare\n"


async def _no_fault(stage: object) -> None:
    """Do nothing."""


def scenario(**more: Any) -> Scenario:
    return Scenario("one", _no_fault, **more)


def good() -> Seen:
    """A scenario in which everything held: answers, a canary, blocks, rest."""
    traffic = Traffic(zero=0.0)
    for _ in range(2):
        outcome = traffic.begin(10, 20)
        outcome.status, outcome.output_tokens, outcome.ended_s = OK, 20, 5.0
    traffic.canaries.append(CanaryAnswer(0, (1, 2, 3), frozenset({0}), "ok"))
    status = {
        "level": 0, "num_kv_blocks": 49, "ladder": [{"num_kv_blocks": 49}], "failed": False, "num_running": 0,
        "num_waiting": 0, "transitions": {"degrade_committed": 2},
    }  # fmt: skip
    snapshots = [Snapshot(1.0, level=3, blocks_published=60, blocks_backed=61)]
    return Seen(traffic, snapshots, status=status, restored_s=0.5, fault_s=4.0, exit_ended=True)


def _cut(seen: Seen) -> None:
    seen.traffic.outcomes[1].status, seen.traffic.outcomes[1].output_tokens = "error", 7


def _server_error(seen: Seen) -> None:
    seen.traffic.outcomes[0].status = "http_500"


def _other_tokens(seen: Seen) -> None:
    seen.traffic.canaries.append(CanaryAnswer(0, (1, 2, 4), frozenset({0}), "ok"))


def _no_receipt(seen: Seen) -> None:
    seen.traffic.canaries.append(CanaryAnswer(0, (1, 2, 3), None, "ok"))


def _unbacked(seen: Seen) -> None:
    seen.snapshots = [Snapshot(2.0, level=3, blocks_published=62, blocks_backed=61)]


def _stuck(seen: Seen) -> None:
    seen.restored_s = None


def _silent(seen: Seen) -> None:
    seen.status = None


def _says(**more: Any) -> Callable[[Seen], None]:
    def change(seen: Seen) -> None:
        seen.status = {**(seen.status or {}), **more}

    return change


def _warned_twice(seen: Seen) -> None:
    seen.log = WARNING * 2


def _runs_on(seen: Seen) -> None:
    seen.exit_ended = False


def _orphan(seen: Seen) -> None:
    seen.left_over = ["VLLM::Worker"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_cut, "request 1: error, 7 of 20 tokens"),
        (_server_error, "request 0: http_500"),
        (_other_tokens, "canary 0: other tokens"),
        (_no_receipt, "canary 0: no receipt"),
        (_unbacked, "62 blocks are published, 61 backed"),
        (_stuck, "not 0, 30 s after"),
        (_silent, "does not answer"),
        (_says(failed=True), "has failed"),
        (_says(num_kv_blocks=50), "50 blocks at level 0, 49 at start"),
        (_says(num_running=1), "1 requests run"),
        (_warned_twice, "2 warnings, 1 allowed"),
        (_runs_on, "did not end in time"),
        (_orphan, "1 processes outlived"),
    ],
)
def test_each_thing_that_must_hold_is_looked_at(change: Callable[[Seen], None], words: str) -> None:
    """Guards: a chaos run that is green whatever the server does."""
    seen = good()
    assert judge(scenario(), seen, REFERENCE) == []
    change(seen)
    (found,) = judge(scenario(), seen, REFERENCE)
    assert words in found


def test_what_is_no_fault_of_the_server() -> None:
    """Guards: a refusal as documented, a degraded canary, or a server that was killed, is called broken."""
    seen = good()
    seen.traffic.outcomes[0].status = "http_503"
    seen.traffic.canaries.append(CanaryAnswer(0, (9, 9, 9), frozenset({0, 3}), "ok"))
    seen.traffic.canaries.append(CanaryAnswer(1, (9, 9, 9), frozenset({0}), "ok"))  # one that stock changes itself
    assert judge(scenario(), seen, REFERENCE) == []
    _cut(seen)  # at 5 s, the fault was at 4
    seen.status, seen.restored_s = None, None
    seen.log = "morphserve: error: vLLM's process VllmWorker-0 was killed (SIGKILL)\n"
    assert judge(scenario(ends=True), seen, REFERENCE) == []
    seen.fault_s, seen.log = 6.0, ""
    before_the_fault, says_nothing = judge(scenario(ends=True), seen, REFERENCE)
    assert "request 1" in before_the_fault and "says why" in says_nothing


def test_a_server_that_is_gone_is_told_in_a_few_lines() -> None:
    """Guards: a thousand lines of one cause, among which the other is not seen."""
    seen = good()
    for _ in range(50):
        seen.traffic.begin(10, 20).status = "error"
    seen.restored_s = None
    *requests, more, stuck = judge(scenario(), seen, REFERENCE)
    assert len(requests) == 3 and more == "and 47 more like that" and "not 0" in stuck


def test_the_figures_are_of_what_was_seen() -> None:
    """Guards: a report that counts something else than the judge looked at."""
    seen = good()
    seen.traffic.outcomes[0].status = "http_503"
    shown = figures(seen)
    assert (shown["requests"], shown["answered"], shown["refused"]) == (2, 1, 1)
    assert (shown["canaries"], shown["canaries_at_level_0"], shown["deepest_level"]) == (1, 1, 3)


def test_scenarios_have_names_and_questions() -> None:
    """Guards: a row that cannot be asked for, or whose report says nothing."""
    assert len({each.name for each in SCENARIOS}) == len(SCENARIOS)
    assert all(each.question.endswith(".") for each in SCENARIOS)
    assert not any(each.is_short and each.alone for each in SCENARIOS), "the gate pays for one server"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_processes_of_a_session() -> None:
    """Guards: an orphan that nobody sees, or a dead process that counts as one."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline()
    assert list(processes.command_lines(child.pid)) == [child.pid] and not processes.has_ended(child.pid)
    assert processes.with_title(child.pid, processes.WORKER) == []
    processes.send([child.pid], signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not buried
    assert processes.command_lines(child.pid) == {} and processes.has_ended(child.pid)
    child.communicate()
    assert processes.has_ended(child.pid)
    processes.send([child.pid], signal.SIGKILL)  # nobody is there: nothing happens


def test_the_table_of_faults_names_what_there_is() -> None:
    """Guards: a cell that names a test, or a scenario, that is gone; a scenario that is in no cell."""
    root = Path(__file__).parents[2]
    text = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [row for row in text.splitlines() if row.startswith("| ") and "| fake |" not in row]
    code = "".join(file.read_text(encoding="utf-8") for file in (root / "tests").rglob("test_*.py"))
    missing = {name for row in rows for name in re.findall(r"`(test_\w+)`", row) if f"def {name}(" not in code}
    assert missing == set()
    faults = text.partition("## Faults from outside")[2]
    last_cells = " ".join(row.rpartition(" | ")[2] for row in faults.splitlines() if row.startswith("| "))
    named = set(re.findall(r"`([a-z-]+)`", last_cells)) - {"read"}
    assert named == {each.name for each in SCENARIOS} - {"nothing", "features"}
    assert all(cell.strip(" -") for row in faults.splitlines() if row.startswith("| ") for cell in row.split("|")[1:-1])
