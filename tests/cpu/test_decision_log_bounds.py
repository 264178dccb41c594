"""A decision log for months: it takes no more than its bound, and a full disk costs it rows and nothing else."""

from __future__ import annotations

import errno
import gzip
import logging
import os
import threading
from pathlib import Path

import pytest
from cpu.log_world import LADDER, SETUPS, THRESHOLD, ask, assert_problem, load, patient, write
from cpu.small_disk import file_size

from morphserve.control import DecisionLog, make_header
from morphserve.control.decisions import decision_log
from morphserve.control.decisions.replay_log import LogError, _texts, read_log, replay
from morphserve.errors import ConfigError
from morphserve.files import RotatingFile
from tests.fakes import Rig

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("patient")]

__all__ = ["patient"]  # the fixture

NAMES = pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])


class Turns:
    """Lets the writer of a log go on with one batch at a time."""

    def __init__(self) -> None:
        self._done, self._go = threading.Semaphore(0), threading.Semaphore(0)
        self.rests: list[float] = []

    def rest(self, writer: object, seconds: float) -> None:
        self.rests.append(seconds)
        self._done.release()
        self._go.acquire()

    def finish_batch(self) -> None:
        self._done.acquire()

    def go_on(self) -> None:
        self._go.release()


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    found = Turns()
    monkeypatch.setattr(decision_log._LineWriter, "_rest", lambda self, seconds: found.rest(self, seconds))
    return found


def files_of(path: Path) -> list[Path]:
    return sorted(path.parent.iterdir())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are full after a few batches."""
    monkeypatch.setattr(decision_log, "_MAX_FILE_BYTES", 20_000)
    monkeypatch.setattr(decision_log, "_MAX_PENDING", 10)  # rows of one batch: what a full file may still take


def write_in_batches(log: DecisionLog, turns: Turns, num: int, seed: int = 1) -> None:
    """Have the policy answer so many times, eight at once."""
    policy, signals = THRESHOLD.build(LADDER), load(seed, num)
    for start in range(0, num, 8):
        turns.finish_batch()
        ask(log, policy, signals[start : start + 8])
        turns.go_on()


@NAMES
def test_a_log_stays_within_its_bound(
    name: str, turns: Turns, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a server that runs for months fills its disk with its diary; the newest rows thrown away for old ones."""
    full = 3_000 if name.endswith("gz") else 20_000
    monkeypatch.setattr(decision_log, "_MAX_FILE_BYTES", full)
    log = DecisionLog(tmp_path / name, make_header(THRESHOLD, LADDER))
    write_in_batches(log, turns, 400)
    turns.finish_batch()
    turns.go_on()
    log.close()
    assert log.num_dropped == 0
    assert [file.name for file in files_of(tmp_path / name)] == [name, *(f"{name}.{i}" for i in (1, 2, 3))]
    assert all(full <= file.stat().st_size < full + 15_000 for file in files_of(tmp_path / name)[1:])
    found = replay(tmp_path / name)
    assert_problem(found, "the file before this one is not here")
    assert len(found.problems) == 1 and found.problems[0].startswith(f"{name}.3, line 1: ")
    assert 20 < found.skipped < 400 and not found.notes


def test_a_log_in_parts_replays(turns: Turns, tmp_path: Path, small: None) -> None:
    """Guards: decisions lost between two files, or a policy that starts anew where a file does."""
    path = tmp_path / "log.jsonl"
    log = DecisionLog(path, make_header(THRESHOLD, LADDER))
    write_in_batches(log, turns, 56)
    turns.go_on()
    log.close()
    assert len(files_of(path)) == 3
    found = replay(path)
    assert found.agrees and found.compared == 56
    assert 0 < replay(tmp_path / "log.jsonl.2").compared < replay(tmp_path / "log.jsonl.1").compared < 56
    (tmp_path / "log.jsonl.1").write_text("")
    assert_problem(replay(path), "the file before this one is not here")


def test_a_policy_after_the_beginning_is_gone_is_asked_again(turns: Turns, tmp_path: Path, small: None) -> None:
    """Guards: nothing of a long log can be replayed; a policy that has forgotten what it learned taken for another."""
    path = tmp_path / "log.jsonl"
    log = DecisionLog(path, make_header(THRESHOLD, LADDER))
    write_in_batches(log, turns, 80)
    log.policy_changed("edited", SETUPS["static"])
    turns.finish_batch()
    ask(log, SETUPS["static"].build(LADDER), load(3, 5))
    turns.go_on()
    turns.go_on()
    log.close()
    for file in files_of(path)[2:]:
        file.unlink()
    found = replay(path)
    assert found.compared == 5 and found.differing == 0 and found.policies == ["static w8"]


def test_a_log_of_another_rotation_is_whole(tmp_path: Path) -> None:
    """Guards: what logrotate has moved to NAME.1 taken for a part of the log, though each starts anew."""
    write(tmp_path / "log.1", THRESHOLD, load(1, 20))
    write(tmp_path / "log", THRESHOLD, load(2, 30))
    assert replay(tmp_path / "log").compared == 30


@NAMES
def test_a_full_disk_costs_rows_and_one_warning(
    name: str, turns: Turns, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a log that ends for good at the first full disk; a warning a second; rows missing without a word."""
    monkeypatch.setattr(decision_log, "_CALM_S", 0.0)
    caplog.set_level(logging.INFO)
    path, signals, policy = tmp_path / name, load(4, 60), THRESHOLD.build(LADDER)
    log = DecisionLog(path, make_header(THRESHOLD, LADDER))
    turns.finish_batch()
    with file_size(path.stat().st_size):
        for batch in (signals[:20], signals[20:30]):
            ask(log, policy, batch)
            turns.go_on()
            turns.finish_batch()
    assert log.num_dropped >= 29 and turns.rests[0] < turns.rests[-1] == 1.0
    ask(log, policy, signals[30:40])
    log.policy_changed("edited", THRESHOLD)
    ask(log, THRESHOLD.build(LADDER), signals[40:])
    turns.go_on()
    turns.finish_batch()
    turns.go_on()
    log.close()
    lines = [line for _, line in read_log(path)]
    assert not [line for line in lines if isinstance(line, LogError)]
    found = replay(path)
    assert_problem(found, "decisions were dropped here")
    assert len(found.problems) == 1 and found.compared == 20 and found.skipped + log.num_dropped == 40
    said = [record.getMessage() for record in caplog.records if "decision_log" in record.getMessage()]
    assert len(said) == 2 and "File too large" in said[0] and f"written again; {log.num_dropped}" in said[1]


def test_a_disk_that_is_full_again_and_again_is_one_warning(
    turns: Turns, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: two lines for each row that finds room, on a disk of which somebody frees a little at a time."""
    caplog.set_level(logging.INFO)
    path, signals, policy = tmp_path / "log", load(8, 60), THRESHOLD.build(LADDER)
    log = DecisionLog(path, make_header(THRESHOLD, LADDER))
    turns.finish_batch()
    for start in range(0, 60, 20):
        with file_size(path.stat().st_size):
            ask(log, policy, signals[start : start + 10])
            turns.go_on()
            turns.finish_batch()
        ask(log, policy, signals[start + 10 : start + 20])
        turns.go_on()
        turns.finish_batch()
    turns.go_on()
    log.close()
    assert len([record for record in caplog.records if "decision_log" in record.getMessage()]) == 1
    assert 0 < log.num_dropped <= 30


def test_a_disk_that_is_full_at_the_start(turns: Turns, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards: rows without the line that says which policy was asked, because that one found no room."""
    path = tmp_path / "log"
    with file_size(0):
        log = DecisionLog(path, make_header(THRESHOLD, LADDER))
        turns.finish_batch()
        for note in range(50):
            log.policy_changed(f"edit {note}", THRESHOLD)
        ask(log, THRESHOLD.build(LADDER), load(5, 30))
        turns.go_on()
        turns.finish_batch()
        assert path.read_bytes() == b""
    turns.go_on()
    log.close()
    first, *middle, _ = [line for _, line in read_log(path)]
    assert first.event == "start" and len(middle) < 10  # type: ignore[union-attr]
    assert len(caplog.records) == 1


def test_what_an_operator_removes_to_make_room_is_begun_again(turns: Turns, tmp_path: Path) -> None:
    """Guards: a log that goes on in a file without a name, whose bytes nobody gets back; or a hole of zeros."""
    path, policy, signals = tmp_path / "log", THRESHOLD.build(LADDER), load(6, 30)
    log = DecisionLog(path, make_header(THRESHOLD, LADDER))
    turns.finish_batch()
    for number, remove in enumerate((path.unlink, lambda: path.write_text(""))):
        remove()
        ask(log, policy, signals[10 * number :][:10])
        turns.go_on()
        turns.finish_batch()
        lines = [line for _, line in read_log(path)]
        assert [line.event for line in lines] == ["continued", *["decision"] * 10]  # type: ignore[union-attr]
    assert files_of(path) == [path]
    turns.go_on()
    log.close()


def test_no_place_for_another_file(
    turns: Turns, tmp_path: Path, small: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: a full file that grows on because there can be no other one."""
    path, policy, signals = tmp_path / "log", THRESHOLD.build(LADDER), load(7, 80)
    log = DecisionLog(path, make_header(THRESHOLD, LADDER))
    (tmp_path / "log.new").mkdir()
    turns.finish_batch()
    for number in range(8):
        ask(log, policy, signals[10 * number :][:10])
        turns.go_on()
        turns.finish_batch()
    assert 20_000 < path.stat().st_size < 40_000 and log.num_dropped
    assert caplog.text.count("Is a directory. Decisions are counted") == 1
    (tmp_path / "log.new").rmdir()
    turns.go_on()
    log.close()
    events = [line.event for _, line in read_log(path)]  # type: ignore[union-attr]
    assert events[:2] == ["continued", "dropped"] and events[-1] == "end"


def test_dropped_decisions_are_counted_where_operators_look(tmp_path: Path) -> None:
    """Guards: a log with gaps, known only to who reads it."""
    log = DecisionLog(tmp_path / "log", make_header(THRESHOLD, LADDER))
    log.close()
    rig = Rig(log=log)
    log._num_dropped = 7
    rig.step(1)
    assert rig.controller.status()["counters"]["decisions_dropped"] == 7


def test_only_a_file_is_a_log(tmp_path: Path) -> None:
    """Guards: a start that hangs on a pipe nobody reads, or a device that is renamed when it is full."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ConfigError, match="Not a regular file. Give a file that can be written"):
            DecisionLog(path, make_header(THRESHOLD, LADDER))


@NAMES
@pytest.mark.parametrize("room", range(0, 60, 7))
def test_a_line_that_does_not_fit_leaves_nothing(name: str, room: int, tmp_path: Path) -> None:
    """Guards: half a line, which spoils the one after it."""
    file = RotatingFile(tmp_path / name, 1 << 20, 2)
    file.append(b"one\n")
    size = (tmp_path / name).stat().st_size
    with file_size(size + room), pytest.raises(OSError, match="too large"):
        file.append(bytes(range(32, 127)) * 2 + b"\n")
    assert (tmp_path / name).stat().st_size == size
    file.append(b"three\n")
    file.close()
    assert [text.strip() for text in _texts(tmp_path / name)] == [b"one", b"three"]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@NAMES
def test_a_full_file_is_closed(name: str, tmp_path: Path) -> None:
    """Guards: a descriptor more for each full file, and what goes keeps its bytes on the disk; a member without end."""
    file = RotatingFile(tmp_path / name, 8, 2)
    before = open_files()
    for _ in range(5):
        file.append(b"one line\n")
        assert file.turn_page() and open_files() == before
    file.close()
    whole = (tmp_path / f"{name}.1").read_bytes()
    assert (gzip.decompress(whole) if name.endswith("gz") else whole) == b"one line\n"


def test_a_rename_that_fails_pushes_no_file_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: each try to begin another file takes an older one, until none is left, or a descriptor."""
    file = RotatingFile(tmp_path / "log", 8, 3)
    for text in (b"oldest--\n", b"older---\n"):
        file.append(text)
        file.turn_page()
    file.append(b"newest--\n")
    rename = os.replace

    def fails(source: Path, target: Path) -> None:
        if source.suffix == ".new":
            raise OSError(errno.EIO, "a disk that fails")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    before = open_files()
    for _ in range(3):
        with pytest.raises(OSError, match="a disk that fails"):
            file.turn_page()
    assert open_files() == before, "a try each second"
    monkeypatch.setattr(os, "replace", rename)
    assert file.turn_page()
    file.close()
    assert [(tmp_path / f"log.{number}").read_bytes() for number in (1, 2)] == [b"newest--\n", b"older---\n"]


def test_all_files_of_a_log_take_what_the_manual_says() -> None:
    """Guards: a bound that the tests above set themselves, and that a server has in name only."""
    assert decision_log._MAX_FILE_BYTES * decision_log._NUM_FILES == 1 << 30
