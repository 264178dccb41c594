"""What `morphserve chaos` calls broken: each thing that must hold, not holding once."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from morphserve.errors import MorphServeError
from morphserve.tools.bench import ClientOptions
from morphserve.tools.chaos import processes, run
from morphserve.tools.chaos.adapters import write_adapter
from morphserve.tools.chaos.faults import clients
from morphserve.tools.chaos.judge import Seen, figures, judge
from morphserve.tools.chaos.libraries import CACHE, SAYS, failing_library
from morphserve.tools.chaos.load import CanaryAnswer, Traffic
from morphserve.tools.chaos.report import report
from morphserve.tools.chaos.scenarios import SCENARIOS, Scenario, by_server
from morphserve.tools.chaos.stage import Stage
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
        "num_waiting": 0, "transitions": {"degrade_committed": 2}, "layers_by_format": {"base": 30},
        "kv_block_bytes": 5,
        "ledgers": [{"budget_bytes": 1000, "weights_bytes": 700, "kv_blocks_bytes": 245, "staging_bytes": 0}],
        "ranks": {"0": {"weight_bytes": 700, "staging_bytes": 0, "num_kv_blocks": 49}},
    }  # fmt: skip
    snapshots = [Snapshot(1.0, level=3, blocks_published=60, blocks_backed=61)]
    first = {**status, "transitions": {}}
    return Seen(
        traffic, snapshots, statuses=[first], status=status, restored_s=0.5, fault_s=4.0, exit_ended=True
    )  # fmt: skip


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


def _overbooked(seen: Seen) -> None:
    ledger = {"budget_bytes": 1000, "weights_bytes": 700, "kv_blocks_bytes": 245, "staging_bytes": 56}
    seen.statuses.append({**seen.statuses[0], "ledgers": [ledger]})


def _holds_too_much(seen: Seen) -> None:
    rank = {"weight_bytes": 700, "staging_bytes": 1, "num_kv_blocks": 60}
    seen.statuses.append({**seen.statuses[0], "ranks": {"0": rank}})


def _mixed(seen: Seen) -> None:
    _other_tokens(seen)
    seen.traffic.canaries[-1].is_mixed = True


def _warned(seen: Seen) -> None:
    seen.log = WARNING


def _warned_twice(seen: Seen) -> None:
    seen.log = WARNING * 2


def _erred(seen: Seen) -> None:
    seen.log = WARNING.replace("WARNING", "ERROR")


def _no_fault_was_met(seen: Seen) -> None:
    seen.fault_error = "nobody has met the fault"


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
        (_says(num_waiting=1), "1 wait"),
        (_says(layers_by_format={"base": 28, "w8": 2}), "layers at level 0 are"),
        (_says(ledgers=[{"budget_bytes": 9, "staging_bytes": 4}]), "4 bytes are staged"),
        (_overbooked, "rank 0 has 1,001 bytes booked"),
        (_holds_too_much, "holds 1,001"),
        (_warned, "1 warnings, 0 allowed"),
        (_erred, "1 warnings, 0 allowed"),
        (_no_fault_was_met, "nobody has met the fault"),
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


def test_a_fault_may_have_one_warning() -> None:
    """Guards: a second line for what has been said, or a first that counts as one too many."""
    seen = good()
    _warned(seen)
    assert judge(scenario(max_warnings=1), seen, REFERENCE) == []
    _warned_twice(seen)
    (found,) = judge(scenario(max_warnings=1), seen, REFERENCE)
    assert "2 warnings, 1 allowed" in found


def test_what_is_no_fault_of_the_server() -> None:
    """Guards: a refusal as documented, a degraded canary, or a server that was killed, is called broken."""
    seen = good()
    seen.traffic.outcomes[0].status = "http_503"
    seen.traffic.canaries.append(CanaryAnswer(0, (9, 9, 9), frozenset({0, 3}), "ok"))
    seen.traffic.canaries.append(CanaryAnswer(1, (9, 9, 9), frozenset({0}), "ok"))  # one that stock changes itself
    _mixed(seen)  # beside an adapter, which stock gives to everybody
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
    seen.statuses[0] = {**seen.statuses[0], "transitions": {"degrade_committed": 1}}  # by the scenario before
    shown = figures(seen)
    assert shown["transitions"] == {"degrade_committed": 1}
    assert (shown["requests"], shown["answered"], shown["refused"]) == (2, 1, 1)
    assert (shown["canaries"], shown["canaries_at_level_0"], shown["deepest_level"]) == (1, 1, 3)


def test_a_report_says_what_did_not_hold() -> None:
    """Guards: a table in which a scenario that is broken looks as the others, or that hides one left out."""
    seen = good()
    _warned(seen)
    violations = judge(scenario(), seen, REFERENCE)
    row = {"name": "one", "violations": violations, **figures(seen)}
    skipped = {"two": "9 heads"}
    text = report({"machine": {"cpu": "x"}, "model": "m", "scenarios": [row], "skipped": skipped})
    assert "| `one` | no | 2 of 2 | 0 | 1 of 1 | 3 | 2 degrade committed | 0.5 | 1 |" in text
    assert "1 warnings, 0 allowed" in text and "* two: 9 heads" in text


def test_scenarios_have_names_and_questions() -> None:
    """Guards: a row that cannot be asked for, or whose report says nothing."""
    assert len({each.name for each in SCENARIOS}) == len(SCENARIOS)
    assert all(each.question.endswith(".") for each in SCENARIOS)
    assert len(by_server(each for each in SCENARIOS if each.is_short)) == 1, "the gate pays for one server"


def test_scenarios_share_servers_that_are_alike() -> None:
    """Guards: a scenario on what another has broken, or without what it needs; or one that nobody runs."""
    own = {"settings": {"cache_dir": "x", "policy": {"kind": "slo"}}}
    damage, ender = scenario(leaves_damage=True, **own), scenario(ends=True)
    plain, library = scenario(), scenario(has_library=True)
    groups = by_server([ender, damage, plain, scenario(**own), damage, library, plain])
    assert groups == [[plain, plain, ender], [scenario(**own), damage], [damage], [library]]
    names = [each.name for group in by_server(SCENARIOS) for each in group]
    assert sorted(names) == sorted(each.name for each in SCENARIOS)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return failing_library(tmp_path_factory.mktemp("library"))
    except MorphServeError as e:
        pytest.skip(str(e))


_PROBE = """
import mmap, os, sys, threading, time
says, directory = os.environ["MORPHSERVE_CHAOS_SAYS"], sys.argv[1]
m = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
read = lambda: open(directory + "/cache/layer.safetensors", "rb", 0).read(1024)
def hung():
    done = []
    reader = threading.Thread(target=lambda: (read(), done.append("read")))
    reader.start()
    for _ in range(200):
        open(directory + "/other", "rb", 0).read(1024)
    done.append("freed")
    os.unlink(says)
    reader.join()
    return done == ["freed", "read"]
def slow():
    begin = time.monotonic()
    read()
    return time.monotonic() - begin >= 0.05
"""
_FAILS = {
    "no-release": "m.madvise(mmap.MADV_DONTNEED)",
    "no-populate": "m.madvise(23)",
    "no-mmap": "mmap.mmap(-1, 3 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)",
    "no-write": "open(directory + '/cache/one', 'wb', 0).write(b'1')",
}
_DOES = {
    "hang-read": "hung()",
    "slow-read 50": "slow()",
    "clock 7200": "time.time() > float(sys.argv[2]) + 7000 > time.monotonic() + 7000",
}
Probe = Callable[[str, str], subprocess.Popen[bytes]]
_STOPS = {"stop-read": "read()", "stop-unmap": _FAILS["no-release"], "stop-map": _FAILS["no-populate"]}


@pytest.fixture
def probe(library: Path, tmp_path: Path) -> Probe:
    """Runs a statement behind the library, while the file says a word."""
    (tmp_path / "cache").mkdir()
    for name in ("cache/layer.safetensors", "other"):
        (tmp_path / name).write_bytes(b"1" * 2048)
    own = {"LD_PRELOAD": str(library), SAYS: str(tmp_path / "says"), CACHE: str(tmp_path / "cache")}

    def run(action: str, word: str) -> subprocess.Popen[bytes]:
        if word:
            (tmp_path / "says").write_text(f"{word}\n")
        command = [sys.executable, "-c", f"{_PROBE}\n{action}", str(tmp_path), str(time.time())]
        with (tmp_path / "said").open("wb") as said:
            return subprocess.Popen(command, env=os.environ | own, stderr=said)

    return run


@pytest.mark.parametrize("word", _FAILS)
def test_a_call_fails_while_the_file_says_so(probe: Probe, tmp_path: Path, word: str) -> None:
    """Guards: a scenario whose fault never happened, so that it holds whatever the server does."""
    assert probe(_FAILS[word], "").wait() == 0
    assert probe(_FAILS[word], "no-" + word).wait() == 0  # another word
    assert probe(_FAILS[word], word).wait() == 1
    said = (tmp_path / "said").read_text()
    assert (tmp_path / "says.met").exists() == (word != "no-write")  # that one is known by how the start ends
    assert "OSError" in said and os.strerror(errno.ENOSPC if word == "no-write" else errno.ENOMEM) in said


@pytest.mark.parametrize("word", _DOES)
def test_reads_and_clocks_do_what_the_file_says(probe: Probe, word: str) -> None:
    """Guards: a disk that is not slow, or a clock that does not jump, in the scenarios that are about them."""
    assert probe(f"assert {_DOES[word]}", word).wait() == 0


@pytest.mark.parametrize("word", _STOPS)
def test_a_process_stops_itself_once(probe: Probe, tmp_path: Path, word: str) -> None:
    """Guards: a rank that goes on where it should stand, or stands at every call after it."""
    process = probe(f"{_STOPS[word]}\n{_STOPS[word]}", word)
    pid, status = os.waitpid(process.pid, os.WUNTRACED)
    assert pid == process.pid and os.WIFSTOPPED(status) and not (tmp_path / "says").exists()
    processes.send([pid], signal.SIGCONT)
    assert process.wait() == 0


def test_a_fault_waits_for_a_change_of_its_own() -> None:
    """Guards: a rank killed at rest, because the first look at a server that has served others differs from none."""
    looks: list[tuple[int, int] | None] = [None, None, (0, 6), (0, 6), (0, 6), (3, 7), (3, 7)]
    left = iter(looks)
    none: Any = None
    stage = Stage(
        none, none, 1, Path(), Path(), Path(), lambda: next(left, looks[-1]), Traffic(), Path(), ""
    )  # fmt: skip
    asyncio.run(stage.in_transition())
    assert next(left, "the last look was met") in ((3, 7), "the last look was met")


def test_requests_that_wait_for_their_level_do_not_keep_the_load_up() -> None:
    """Guards: a scenario that waits for who waits for level 0, under a load in which it never comes."""
    ended = asyncio.Event()

    class Held:
        options = ClientOptions(url="", model="")
        owed: list[asyncio.Task[None]] = []

        async def in_transition(self) -> None:
            return

        async def stream(self, *args: Any, **kwargs: Any) -> None:
            await ended.wait()

        async def post(self, *args: Any, **kwargs: Any) -> None:
            return

        async def status_from_now(self) -> dict[str, int]:
            return {"num_held_total": 2}

    async def run() -> None:
        stage = Held()
        await asyncio.wait_for(clients.held_requests(stage), 20)  # type: ignore[arg-type]
        assert stage.owed and not any(task.done() for task in stage.owed)
        ended.set()
        await asyncio.gather(*stage.owed)

    asyncio.run(run())


def test_the_last_look_comes_after_the_canaries_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a server said to be stuck at a level that the canaries themselves have brought about."""
    looks: list[str] = []

    class Resting:
        level, traffic, options = 2, Traffic(), None

        async def status_from_now(self) -> dict[str, int]:
            looks.append("status")
            return {"level": self.level}

    stage, seen = Resting(), good()

    async def until(reached: Callable[[], bool], limit_s: float) -> bool:
        looks.append("wait")
        while not reached():
            stage.level -= 1
        return True

    async def ask(*args: Any) -> list[CanaryAnswer]:
        looks.append("ask")
        stage.level = 3
        return []

    async def at_once(seconds: float) -> None:
        return

    monkeypatch.setattr(run, "until", until)
    monkeypatch.setattr(run, "_ask_all", ask)
    monkeypatch.setattr(asyncio, "sleep", at_once)
    asyncio.run(run._rest(seen, None, stage))  # type: ignore[arg-type]
    assert looks == ["wait", "ask", "wait", "status"] and seen.status == {"level": 0}


def test_an_adapter_is_what_vllm_loads(tmp_path: Path) -> None:
    """Guards: adapters that are refused for what they are, in a scenario that is about loading them."""
    config = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    directory = write_adapter(tmp_path, tmp_path / "adapter", seed=1)
    tensors = load_file(directory / "adapter_model.safetensors")
    shapes = {tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith("q_proj.lora_B.weight")}
    assert len(tensors) == 6 and shapes == {(8, 8)}
    assert json.loads((directory / "adapter_config.json").read_text())["r"] == 8


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
    assert named == {each.name for each in SCENARIOS} - {"nothing"}
    _, *table = [row.split("|")[1:-1] for row in faults.splitlines() if row.startswith("| ")]
    assert len(table) > 14 and {len(row) for row in table} == {4}
    assert all("`" in cell or len(cell.split()) > 4 for _, *cells in table for cell in cells), "a name, or a reason"
