"""Signals and decisions as lines of JSON, written by a thread so that no step waits for a disk.

    {"event": "start", "schema": 3, ...}   all that a policy is made of; a restarted server writes its own
    {"event": "decision", "seq": 7, ..., "decision": {...}, "signals": {...}}   one question and its answer, whole
    {"event": "policy", ...}               as at the start: from the next row on another policy answers
    {"event": "continued", ...}            as at the start, of a file that goes on where NAME.1 ends
    {"event": "dropped", "seq": 12}        the disk was too slow or full: rows are missing here, up to this one
    {"event": "end", "seq": 99}            the log was closed in order, after this decision

A file of 256 MiB is full: it becomes NAME.1, and of NAME.1 to NAME.3 the oldest goes, so a log takes 1 GiB at most.
While the disk takes no line decisions are counted instead, and written again once it does.
Where the name ends in .gz, each server writes a gzip member; what it has flushed can be read though a kill tears the
member. Numbers come back as the type that their field has, floats bit by bit.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from morphserve.errors import ConfigError
from morphserve.files import RotatingFile
from morphserve.user_input import user_path
from morphserve.version import __version__
from policies import Decision, Ladder, PolicySetup, Signals, StepLoad

logger = logging.getLogger(__name__)

SCHEMA: Literal[3] = 3  # of these lines, and of the signals and decisions in them: a new field is a new schema

_MAX_PENDING = 1024  # rows; beyond that the disk is too slow and rows are dropped, and counted
_REPEAT_S = 1.0  # how often an unchanged decision is written, where only changes are
_CLOSE_TIMEOUT_S = 5.0
_REST_S = 0.1  # of the writer after a batch: waking it costs a step more than what it then writes
_MAX_FILE_BYTES = 256 << 20
_NUM_FILES = 4
_RETRY_S = 1.0  # of the writer after a batch that found no room
_CALM_S = 60.0  # failures that are less apart are one fault, of which one WARNING speaks
_MAX_KEPT = 8  # lines that are not rows, of those that found no room

Detail = Literal["changes", "all"]


class _Strict:
    """Read back as it was written, or refused."""

    __slots__ = ()
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")


@dataclass(frozen=True, slots=True)
class Header(_Strict):
    """What a log starts with, and what another policy starts with."""

    event: Literal["start", "policy", "continued"]
    schema: Literal[3]
    morphserve: str  # version of the package that wrote it
    engine: int  # data-parallel index
    detail: Detail  # changes = only rows of another level, else one a second
    wall_s: float  # since the epoch
    note: str  # why another policy
    ladder: Ladder
    setup: PolicySetup


@dataclass(slots=True)
class Row(_Strict):
    """One question and its answer. Not frozen: a step makes one, and that would take twice as long."""

    event: Literal["decision"]
    seq: int  # of the decision, from 1; those that are not written count
    wall_s: float
    changed: bool  # another level than the row before
    kv_usage: float  # follows from the signals; for who reads along
    new_step: bool  # `last_step` is another than the newest before, though it may be equal: policies count by identity
    decision: Decision
    signals: Signals


@dataclass(frozen=True, slots=True)
class Mark(_Strict):
    """Rows up to `seq` are missing, or it was the last."""

    event: Literal["dropped", "end"]
    seq: int


Line = Header | Row | Mark
# One each, because a union takes three times as long.
_WRITERS: dict[type[Line], TypeAdapter[Any]] = {cls: TypeAdapter(cls) for cls in (Header, Row, Mark)}


def make_header(setup: PolicySetup, ladder: Ladder, engine: int = 0, detail: Detail = "all") -> Header:
    """Return what a log of this version starts with."""
    return Header("start", SCHEMA, __version__, engine, detail, time.time(), "", ladder, setup)


class DecisionLog:
    """Every decision; or, a filter on the same rows, new levels, and one row a second while nothing changes."""

    def __init__(self, path: Path, header: Header) -> None:
        """Open `path` for appending and start the writer.

        Args:
            path: of the file, compressed if it ends in .gz; directories are made.
            header: the first line; its `detail` is the filter.

        Raises:
            ConfigError: the file cannot be written.
        """
        path = user_path(path)
        try:
            file = RotatingFile(path, _MAX_FILE_BYTES, _NUM_FILES)
        except OSError as e:
            raise ConfigError(f"decision_log {path}: {e.strerror}. Give a file that can be written.") from e
        self._num_dropped = 0
        self._in_gap = False  # rows have been dropped, and the log does not say so yet
        self._header = header
        self._seq = 0
        self._level: int | None = None
        self._row_s = float("-inf")
        self._step: StepLoad | None = None  # the newest there was
        self._closing = threading.Event()
        self._pending: SimpleQueue[Line | None] = SimpleQueue()
        self._pending.put(header)
        self._lines = _LineWriter(file, str(path), self._pending, self._closing)
        self._writer = threading.Thread(target=self._lines.run, name="morphserve-decision-log", daemon=True)
        self._writer.start()

    @property
    def num_dropped(self) -> int:
        """Decisions that should stand in the log and do not, because the disk was too slow or full."""
        return self._num_dropped + self._lines.num_lost

    def record(self, signals: Signals, decision: Decision) -> None:
        """Queue a row, unless the filter says no or the disk is behind. Never blocks."""
        self._seq += 1
        # The reason of an unchanged level may carry figures that move: only the level counts as change.
        changed = decision.level != self._level
        if not (changed or self._header.detail == "all" or signals.now_s - self._row_s >= _REPEAT_S):
            return
        self._level, self._row_s = decision.level, signals.now_s
        if self._pending.qsize() >= _MAX_PENDING:
            self._num_dropped += 1
            self._in_gap = True
            return
        self._tell_gap(self._seq - 1)
        step = signals.last_step
        new_step = step is not None and step is not self._step
        self._step = step or self._step
        figures = (time.time(), changed, signals.kv_usage, new_step)
        self._pending.put(Row("decision", self._seq, *figures, decision, signals))

    def policy_changed(self, note: str, setup: PolicySetup) -> None:
        """Note that another policy answers from the next row on. Never blocks, and is never dropped."""
        self._tell_gap(self._seq)
        self._pending.put(replace(self._header, event="policy", wall_s=time.time(), note=note, setup=setup))

    def close(self) -> None:
        """Write what is queued and close the file. May be called twice."""
        if not self._writer.is_alive():
            return
        self._tell_gap(self._seq)
        self._pending.put(Mark("end", self._seq))
        self._pending.put(None)
        self._closing.set()
        self._writer.join(_CLOSE_TIMEOUT_S)
        if self._writer.is_alive():
            logger.warning("decision_log: not written within %.0f s; the rest is lost", _CLOSE_TIMEOUT_S)

    def _tell_gap(self, last_seq: int) -> None:
        if self._in_gap:
            self._pending.put(Mark("dropped", last_seq))
            self._in_gap = False


class _LineWriter:
    """What the thread does: each batch of lines stands in the file as a whole, or its rows are counted as lost."""

    def __init__(
        self, file: RotatingFile, name: str, pending: SimpleQueue[Line | None], closing: threading.Event
    ) -> None:
        self.num_lost = 0  # rows
        self._file = file
        self._name = name
        self._pending = pending
        self._closing = closing
        self._lines: list[Line] = []  # that are to be written next
        self._texts: list[bytes] = []  # of the same
        self._header: Header | None = None  # the newest that stands in the file
        self._failed_s: float | None = None  # the last time; None = the log is well

    def run(self) -> None:
        """Write what comes until None does."""
        try:
            while (line := self._pending.get()) is not None:
                self._lines.append(line)
                self._texts.append(to_text(line))
                if not (is_last := self._pending.empty()) and len(self._lines) < _MAX_PENDING:
                    continue
                if not self._write():
                    self._rest(_RETRY_S)
                elif is_last:
                    self._rest(_REST_S)
            self._write()
            self._file.close()
        except Exception as e:  # a mistake of ours
            logger.warning("decision_log %s: %s; no further decisions are written", self._name, e)

    def _rest(self, seconds: float) -> None:
        self._closing.wait(seconds)

    def _write(self) -> bool:
        """Write the lines; return whether they stand in the file."""
        if not self._lines:
            return True
        try:
            if self._file.turn_page() and self._header is not None:
                self._texts.insert(0, to_text(replace(self._header, event="continued", wall_s=time.time())))
            self._file.append(b"".join(self._texts))
        except OSError as e:
            self._lose(e)
            return False
        headers = [line for line in self._lines if isinstance(line, Header)]
        self._header = headers[-1] if headers else self._header
        self._lines, self._texts = [], []
        if self._failed_s is not None and time.monotonic() - self._failed_s >= _CALM_S:
            self._failed_s = None
            logger.info("decision_log %s: written again; %d decisions are missing", self._name, self.num_lost)
        return True

    def _lose(self, error: OSError) -> None:
        if self._failed_s is None:
            logger.warning(
                "decision_log %s: %s. Decisions are counted as dropped until it can be written again: free some disk "
                "space, or see to its directory.", self._name, error.strerror,
            )  # fmt: skip
        self._failed_s = time.monotonic()
        self.num_lost += sum(isinstance(line, Row) for line in self._lines)
        self._lines = _without_rows(self._lines)
        self._texts = [to_text(line) for line in self._lines]


def _without_rows(lines: Sequence[Line]) -> list[Line]:
    """Return what is to be written later of lines that found no room: which policies answered, and where rows miss."""
    kept: list[Line] = []
    for line in lines:
        if isinstance(line, Header):
            kept.append(line)
            continue
        if kept and isinstance(kept[-1], Mark):
            kept.pop()
        kept.append(Mark("dropped", line.seq))
    return kept if len(kept) <= _MAX_KEPT else [kept[0], *kept[1 - _MAX_KEPT :]]


def to_text(line: Line) -> bytes:
    """Return what is written of a line, its end included."""
    return _WRITERS[type(line)].dump_json(line) + b"\n"
