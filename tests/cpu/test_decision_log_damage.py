"""What a decision log cannot claim: rows dropped, a disk that fails, a kill, a damaged file."""

from __future__ import annotations

import gzip
import os
import subprocess
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cpu.log_world import LADDER, SETUPS, SLO, THRESHOLD, ask, assert_problem, load, patient, row, write

from morphserve.__main__ import main
from morphserve.control import DecisionLog, make_header
from morphserve.control.decisions import replay_log
from morphserve.control.decisions.decision_log import Header, Mark, Row, to_text
from morphserve.control.decisions.replay_log import LogError, read_log, replay
from policies import (
    Decision,
    PolicySetup,
)

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("patient")]

__all__ = ["patient"]  # the fixture


def test_sample_is_no_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: the usual log taken for whole, with few decisions or with every one of them in it."""
    for seconds, detail in ((0.1, "log"), (1.0, "every")):
        log = DecisionLog(tmp_path / detail, make_header(THRESHOLD, LADDER, detail="changes"))
        for i, s in enumerate(load(7, 100)):
            log.record(replace(s, now_s=i * seconds), Decision(0, ""))
        log.close()
        assert main(["replay-log", str(tmp_path / detail)]) == 1
        out = capsys.readouterr().out
        assert out.count("NOT PROVEN") == 1 and "decision_log_detail: changes" in out


class SlowDisk:
    """Room for 100 rows, and a writer that stops at its next line until `go_on`."""

    def __init__(self, path: Path, setup: PolicySetup, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("morphserve.control.decisions.decision_log._MAX_PENDING", 100)
        monkeypatch.setattr("morphserve.control.decisions.decision_log.to_text", self._held)
        self._gate, self._drained = threading.Event(), threading.Event()
        self.log = DecisionLog(path, make_header(setup, LADDER))

    def _held(self, line: Header | Row | Mark) -> bytes:
        self._gate.wait()
        if self.log._pending.empty():
            self._drained.set()
        return to_text(line)

    def go_on(self) -> None:
        self._gate.set()
        self._drained.wait()


@pytest.mark.parametrize("lost", ["end", "middle"])
def test_dropped_pairs_are_marked(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a gap that nobody sees; a policy asked on as if it had seen what it had not; numbers that run apart."""
    path, signals = tmp_path / "log", load(8, 400)
    disk = SlowDisk(path, THRESHOLD, monkeypatch)
    policy = THRESHOLD.build(LADDER)
    ask(disk.log, policy, signals[:300])
    dropped = disk.log.num_dropped
    assert 190 < dropped < 210
    disk.go_on()
    if lost == "middle":
        ask(disk.log, policy, signals[300:340])
        disk.log.policy_changed("edited", THRESHOLD)
        ask(disk.log, THRESHOLD.build(LADDER), signals[340:360])
    disk.log.close()
    found = replay(path)
    assert_problem(found, f"{dropped} decisions were dropped here")
    assert found.differing == 0 and len(found.problems) == 1 and not found.notes
    assert found.skipped == (40 if lost == "middle" else 0)
    assert found.compared == 300 - dropped + (20 if lost == "middle" else 0)


def test_reload_is_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: answers of the new policy compared with the old one's, because the line between them found no room."""
    path, signals = tmp_path / "log", load(9, 200)
    disk = SlowDisk(path, THRESHOLD, monkeypatch)
    ask(disk.log, THRESHOLD.build(LADDER), signals[:150])
    disk.log.policy_changed("edited", SLO)
    policy = SLO.build(LADDER)
    ask(disk.log, policy, signals[150:160])  # no room: dropped, behind the event
    disk.go_on()
    ask(disk.log, policy, signals[160:])
    disk.log.close()
    found = replay(path)
    assert found.policies == ["threshold default", "slo default"]
    gaps = [problem.split()[2] for problem in found.problems]
    assert gaps == [str(disk.log.num_dropped - 10), "10"]
    assert found.differing == 0 and found.skipped == 40


@pytest.mark.parametrize("name", ["log", "log.gz"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lines: lines[:-3] + [lines[-3][:9]], "line 100: the line is cut or damaged"),
        (lambda lines: lines[:50] + lines[51:], "line 51: decision 51 stands where 50 is due"),
        (lambda lines: lines[:-2] + lines[-1:], "the log ends after decision 100, the last one here is 99"),
        (lambda lines: lines[1:], "line 1: nothing says what policy was asked: the start is missing"),
        (lambda lines: lines[:1], "no decision in it"),
        (lambda lines: [*lines[:20], b'{"event":"tea"}\n', *lines[20:]], "line 21: no line that this version writes"),
        (lambda lines: [lines[0].replace(b'"schema":3', b'"schema":9', 1), *lines[1:]], "schema 9"),
        (lambda lines: [*lines[:20], b"[20,[99,1]]\n"], "line 21: schema 1"),
        (lambda lines: [*lines[:20], b"\xff\n", *lines[20:]], "line 21: the line is cut or damaged"),
        (lambda lines: [], "no decision in it"),
    ],
)  # fmt: skip
def test_damage_is_named(damage: Callable[[list[bytes]], list[bytes]], words: str, name: str, tmp_path: Path) -> None:
    """Guards: "all agree" of a log of which a part is missing; one damaged line reported a thousand times."""
    path = tmp_path / name
    write(path, THRESHOLD, load(10, 100))
    packed = gzip.compress if name == "log.gz" else bytes
    path.write_bytes(packed(b"".join(damage(text_of(path).splitlines(keepends=True)))))
    found = replay(path)
    assert_problem(found, words)
    assert len(found.problems) == 1 and found.differing == 0


def text_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return gzip.decompress(raw) if path.suffix == ".gz" else raw


def test_blank_lines_are_none(tmp_path: Path) -> None:
    """Guards: a log that an editor has touched is called damaged."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(10, 5))
    path.write_text(path.read_text().replace("\n", "\n\n"))
    assert replay(path).agrees


def test_restart_appends(tmp_path: Path) -> None:
    """Guards: a killed server's half line spoils the log of the next one; its policy is carried over."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(11, 80))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-10]) + lines[-10][:30])
    write(path, SETUPS["static"], load(12, 30))
    found = replay(path)
    assert_problem(found, "the line is cut")
    assert found.compared == 71 + 30 and found.differing == 0 and len(found.problems) == 1


def test_torn_member_ends_where_it_is_torn(tmp_path: Path) -> None:
    """Guards: what a killed server had flushed cannot be read, or what the next one appends is lost behind it."""
    path, signals = tmp_path / "log.gz", load(11, 8)
    lines_of_one = [make_header(THRESHOLD, LADDER), *(row(s, i) for i, s in enumerate(signals, start=1))]
    sizes = []
    with gzip.open(path, "wb") as member:
        for line in lines_of_one:
            member.write(to_text(line))
            member.flush()
            sizes.append(path.stat().st_size)
    torn = path.read_bytes()
    path.unlink()
    write(path, SETUPS["static"], load(12, 3))
    appended = path.read_bytes()
    after = len(text_of(path).splitlines())
    for size in range(2, len(torn)):
        path.write_bytes(torn[:size] + appended)
        lines = [line for _, line in read_log(path)]
        whole = sum(size >= flushed for flushed in sizes)
        before = lines[:-after]
        assert not any(isinstance(line, LogError) for line in [*lines[:whole], *lines[-after:]])
        assert len([line for line in before if not isinstance(line, LogError)]) >= whole
        assert sum(isinstance(line, LogError) for line in before) <= 1


def test_flipped_bits_are_damage(tmp_path: Path) -> None:
    """Guards: a traceback of zlib, or "all agree" before it; what a later server wrote lost with it."""
    path = tmp_path / "log.gz"
    write(path, THRESHOLD, load(11, 400))
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2] ^= 0x55
    path.write_bytes(packed)
    write(path, THRESHOLD, load(12, 30))
    found = replay(path)
    assert_problem(found, "the line is cut or damaged")
    assert found.differing == 0 and found.compared >= 30 and len(found.problems) == 1


def test_log_that_was_compressed_later(tmp_path: Path) -> None:
    """Guards: members of gzip(1), as a rotated log has them, cannot be read."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(11, 40))
    write(path, THRESHOLD, load(12, 40))
    subprocess.run(["gzip", path], check=True)
    write(path.with_suffix(".gz"), THRESHOLD, load(13, 40))
    found = replay(path.with_suffix(".gz"))
    assert found.agrees and found.compared == 120


def test_killed_server_is_a_note(tmp_path: Path) -> None:
    """Guards: whole lines that cannot be used because the server did not end in order; silence about it."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(13, 20))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    found = replay(path)
    assert found.agrees and "not closed" in found.notes[0]


def test_other_version_is_a_note(tmp_path: Path) -> None:
    """Guards: a log that cannot be replayed after every release, or one that hides where it is from."""
    path = tmp_path / "log"
    write(path, THRESHOLD, load(14, 20))
    path.write_text(path.read_text().replace('"morphserve":"', '"morphserve":"9.', 1))
    found = replay(path)
    assert found.agrees and "written by morphserve 9." in found.notes[0]


def test_unreadable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a traceback."""
    assert main(["replay-log", str(tmp_path / "none")]) == 1
    assert "none: No such file or directory. Give a readable file." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/dev/zero", "pipe"])
def test_what_has_no_end_is_no_log(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a command that reads until there is no memory, or that waits for a writer."""
    file = tmp_path / name
    if name == "pipe":
        os.mkfifo(file)
    assert main(["replay-log", str(file)]) == 1
    assert f"{name}: Not a regular file. Give a readable file." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["log", "log.gz"])
def test_a_line_that_goes_on_and_on_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a file of some kilobytes that unpacks to all of the memory there is."""
    monkeypatch.setattr(replay_log, "_LONGEST_LINE", 1000)
    monkeypatch.setattr(replay_log, "_CHUNK_BYTES", 10)
    decompressobj, unpacked = zlib.decompressobj, []

    def counting(**named: int) -> Any:
        stream = decompressobj(**named)

        def decompress(part: bytes) -> bytes:
            unpacked.append(len(text := stream.decompress(part)))
            return text

        return SimpleNamespace(decompress=decompress)

    monkeypatch.setattr(zlib, "decompressobj", counting)
    text = b"0" * 1_000_000
    (tmp_path / name).write_bytes(gzip.compress(text) if name == "log.gz" else text)
    assert main(["replay-log", str(tmp_path / name)]) == 1
    assert "line 1 is longer than 1,000 bytes, which none of a log is. Give a file" in capsys.readouterr().err
    assert sum(unpacked) < 100_000
