"""The decision log: what is written, how often, and what a bad disk does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from morphserve.control import DecisionLog
from morphserve.errors import ConfigError
from policies import Decision, Signals
from tests.fakes import Rig

pytestmark = pytest.mark.cpu


def signals(now_s: float) -> Signals:
    return Signals(now_s, 0, 0, 21, 5, 1, 2, 0.5, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_changes_and_one_line_a_second(tmp_path: Path) -> None:
    """Guards: a line per step fills the disk; a change between two lines is lost."""
    path = tmp_path / "new" / "decisions.jsonl"
    log = DecisionLog(path, wall_clock=lambda: 7.0)
    for i in range(30):
        log.record(signals(i * 0.1), Decision(0 if i < 14 else 2, f"reason {i}"))
    log.close()
    log.close()
    lines = read(path)
    assert [line["reason"] for line in lines] == ["reason 0", "reason 10", "reason 14", "reason 24"]
    assert [line["changed"] for line in lines] == [True, False, True, False]
    assert lines[2]["level"] == 2 and lines[2]["wall_s"] == 7.0 and lines[2]["kv_usage"] == 0.25
    assert lines[0]["signals"]["num_kv_blocks"] == 21  # type: ignore[index]
    assert log.num_dropped == 0


def test_unwritable_path_is_refused_at_start(tmp_path: Path) -> None:
    """Guards: found out when the first decision is written."""
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match="decision_log .*file/log.jsonl: .* Give a file that can be written"
    ):
        DecisionLog(tmp_path / "file" / "log.jsonl")


def test_disk_error_ends_the_log_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a full disk stops the controller, or close() waits for ever."""
    log = DecisionLog(tmp_path / "log.jsonl")

    class Full:
        name = "log.jsonl"

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *args: object) -> None: ...

        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

    log.close()
    log._file = Full()  # type: ignore[assignment]
    log._pending.put((0.0, signals(0.0), Decision(0, ""), True))
    log._pending.put((0.0, signals(0.0), Decision(0, ""), True))
    log._pending.put(None)
    log._write()
    assert "No space left on device" in caplog.text and log.num_dropped == 1


def test_slow_disk_drops_lines_instead_of_waiting(tmp_path: Path) -> None:
    """Guards: an engine step that waits for a disk; a queue without bound."""
    log = DecisionLog(tmp_path / "log.jsonl")
    log.close()  # nobody takes lines any more
    for i in range(1500):
        log.record(signals(float(i)), Decision(i, ""))
    assert log.num_dropped == 1500 - 1024


def test_controller_writes_through_it(tmp_path: Path) -> None:
    """Guards: a decision log that is configured and never fed."""
    path = tmp_path / "log.jsonl"
    log = DecisionLog(path)
    Rig(log=log).go_to(1)
    log.close()
    assert [line["level"] for line in read(path)] == [1]


def test_broken_log_does_not_trip_the_controller(tmp_path: Path) -> None:
    """Guards: morphing stops because of its diary."""
    log = DecisionLog(tmp_path / "log.jsonl")
    log.record = lambda *args: 1 / 0  # type: ignore[method-assign,assignment]
    rig = Rig(log=log)
    rig.go_to(1)
    log.close()
    assert rig.controller.counters.errors == {"decision_log": 1} and not rig.controller.tripped
