"""The decision log: what is written, how often, and what a bad disk does."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from morphserve.control import DecisionLog, make_header
from morphserve.control.decisions.decision_log import Detail, Header
from morphserve.errors import ConfigError
from policies import Decision, MorphLevel, PolicySetup, Signals, StaticConfig, StepLoad
from tests.fakes import Rig

pytestmark = pytest.mark.cpu


def header(detail: Detail = "changes") -> Header:
    ladder = (MorphLevel(0, ("base",), 10, 21),)
    return make_header(PolicySetup(StaticConfig(kind="static")), ladder, detail=detail)


def signals(now_s: float, step: StepLoad | None = None) -> Signals:
    return Signals(now_s, 0, 0, 21, 5, 1, 2, 0.5, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, last_step=step)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(path: Path) -> list[dict[str, Any]]:
    return [line for line in read(path) if line["event"] == "decision"]


def write(path: Path, detail: Detail) -> list[dict[str, Any]]:
    log = DecisionLog(path, header(detail))
    for i in range(30):
        log.record(signals(i * 0.1), Decision(0 if i < 14 else 2, f"reason {i}"))
    log.close()
    log.close()
    assert log.num_dropped == 0
    return rows(path)


def test_changes_and_one_row_a_second(tmp_path: Path) -> None:
    """Guards: a row per step fills the disk; a change between two rows is lost."""
    path, before = tmp_path / "new" / "decisions.jsonl", time.time()
    found = write(path, "changes")
    assert [row["decision"]["reason"] for row in found] == ["reason 0", "reason 10", "reason 14", "reason 24"]
    assert [row["changed"] for row in found] == [True, False, True, False]
    assert found[2]["decision"]["level"] == 2 and found[2]["kv_usage"] == 0.25
    assert found[0]["signals"]["num_kv_blocks"] == 21
    assert before <= found[0]["wall_s"] <= found[3]["wall_s"] <= time.time()
    first, *_, last = read(path)
    assert (first["event"], first["schema"], first["detail"]) == ("start", 3, "changes")
    assert last == {"event": "end", "seq": 30}


def test_changes_are_a_filter(tmp_path: Path) -> None:
    """Guards: two formats; numbers that count rows, so that nobody can find a row of one log in the other."""
    some, every = write(tmp_path / "some", "changes"), write(tmp_path / "every", "all")
    assert len(every) == 30 and [row["seq"] for row in some] == [1, 11, 15, 25]
    assert [row | {"wall_s": 0} for row in some] == [every[row["seq"] - 1] | {"wall_s": 0} for row in some]


def test_row_is_whole(tmp_path: Path) -> None:
    """Guards: a row that says only what is new, which nobody can read alone."""
    log = DecisionLog(tmp_path / "log", header("all"))
    for now_s in (1.0, 2.0):
        log.record(signals(now_s, StepLoad(0.125, 4, 0, 100, 1)), Decision(1, "because", 700))
    log.close()
    first, second = rows(tmp_path / "log")
    assert first["signals"].keys() == second["signals"].keys() == set(Signals.__dataclass_fields__)
    assert second["signals"]["last_step"] == {
        "seconds": 0.125, "num_seqs": 4, "prefill_tokens": 0, "context_tokens": 100, "level": 1,
    }  # fmt: skip
    decision = {"level": 1, "reason": "because", "max_queued_tokens": 700, "min_floor": 0, "is_final": False}
    assert second["decision"] == decision


def test_unwritable_path_is_refused_at_start(tmp_path: Path) -> None:
    """Guards: found out when the first decision is written."""
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match="decision_log .*file/log.jsonl: .* Give a file that can be written"
    ):
        DecisionLog(tmp_path / "file" / "log.jsonl", header())


def test_slow_disk_drops_rows_instead_of_waiting(tmp_path: Path) -> None:
    """Guards: an engine step that waits for a disk; a queue without bound."""
    log = DecisionLog(tmp_path / "log.jsonl", header())
    log.close()  # nobody takes rows any more
    for i in range(1500):
        log.record(signals(float(i)), Decision(i, ""))
    assert log.num_dropped == 1500 - 1024 and log._pending.qsize() == 1024


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_open_log_can_be_read(name: str, tmp_path: Path) -> None:
    """Guards: rows that wait in a buffer: lost with a killed server, unseen by who reads along."""
    from morphserve.control.decisions.replay_log import read_log

    log, flushed = DecisionLog(tmp_path / name, header("all")), threading.Event()
    log._closing.wait = lambda timeout=None: flushed.set() or False  # type: ignore[method-assign,func-returns-value]
    for i in range(3):
        log.record(signals(float(i)), Decision(0, ""))
    while len(lines := list(read_log(tmp_path / name))) < 4:
        flushed.wait()
        flushed.clear()
    assert [line.event for _, line in lines] == ["start", *["decision"] * 3]  # type: ignore[union-attr]
    log.close()
    assert (tmp_path / name).read_bytes()[:2] == (b"\x1f\x8b" if name.endswith("gz") else b'{"')


def test_controller_writes_through_it(tmp_path: Path) -> None:
    """Guards: a decision log that is configured and never fed."""
    path = tmp_path / "log.jsonl"
    log = DecisionLog(path, header())
    Rig(log=log).go_to(1)
    log.close()
    assert [row["decision"]["level"] for row in rows(path)] == [1]


def test_broken_log_does_not_trip_the_controller(tmp_path: Path) -> None:
    """Guards: morphing stops because of its diary."""
    log = DecisionLog(tmp_path / "log.jsonl", header())
    log.record = lambda *args: 1 / 0  # type: ignore[method-assign,assignment]
    rig = Rig(log=log)
    rig.go_to(1)
    log.close()
    assert rig.controller.counters.errors == {"decision_log": 1} and not rig.controller.failed
