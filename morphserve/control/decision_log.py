"""Signals and decisions as lines of JSON, written by a thread so that no step waits for a disk.

    {"event": "start", "schema": 3, ...}   all that a policy is made of; a restarted server writes its own
    {"event": "decision", "seq": 7, ..., "decision": {...}, "signals": {...}}   one question and its answer, whole
    {"event": "policy", ...}               as at the start: from the next row on another policy answers
    {"event": "dropped", "seq": 12}        the disk was too slow: rows are missing here, up to this one
    {"event": "end", "seq": 99}            the log was closed in order, after this decision

Where the name ends in .gz, each server writes a gzip member; what it has flushed can be read though a kill tears the
member. Numbers come back as the type that their field has, floats bit by bit.
"""

from __future__ import annotations

import gzip
import logging
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, Literal

from pydantic import ConfigDict, TypeAdapter

from morphserve.errors import ConfigError
from morphserve.version import __version__
from policies import Decision, Ladder, PolicySetup, Signals, StepLoad

logger = logging.getLogger(__name__)

SCHEMA: Literal[3] = 3  # of these lines, and of the signals and decisions in them: a new field is a new schema

_MAX_PENDING = 1024  # rows; beyond that the disk is too slow and rows are dropped, and counted
_REPEAT_S = 1.0  # how often an unchanged decision is written, where only changes are
_CLOSE_TIMEOUT_S = 5.0
_REST_S = 0.1  # of the writer after a batch: waking it costs a step more than what it then writes
_GZIP_LEVEL = 1  # level 6 makes an eighth less of it, and takes three times as long

Detail = Literal["changes", "all"]


class _Strict:
    """Read back as it was written, or refused."""

    __slots__ = ()
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")


@dataclass(frozen=True, slots=True)
class Header(_Strict):
    """What a log starts with, and what another policy starts with."""

    event: Literal["start", "policy"]
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
        self._path = path.expanduser()
        try:
            self._file = _open(self._path)
        except OSError as e:
            raise ConfigError(f"decision_log {self._path}: {e.strerror}. Give a file that can be written.") from e
        self.num_dropped = 0
        self._in_gap = False  # rows have been dropped, and the log does not say so yet
        self._header = header
        self._seq = 0
        self._level: int | None = None
        self._row_s = float("-inf")
        self._step: StepLoad | None = None  # the newest there was
        self._closing = threading.Event()
        self._pending: SimpleQueue[Line | None] = SimpleQueue()
        self._pending.put(header)
        self._writer = threading.Thread(target=self._write, name="morphserve-decision-log", daemon=True)
        self._writer.start()

    def record(self, signals: Signals, decision: Decision) -> None:
        """Queue a row, unless the filter says no or the disk is behind. Never blocks."""
        self._seq += 1
        # The reason of an unchanged level may carry figures that move: only the level counts as change.
        changed = decision.level != self._level
        if not (changed or self._header.detail == "all" or signals.now_s - self._row_s >= _REPEAT_S):
            return
        self._level, self._row_s = decision.level, signals.now_s
        if self._pending.qsize() >= _MAX_PENDING:
            self.num_dropped += 1
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

    def _write(self) -> None:
        try:
            with self._file as file:
                while (line := self._pending.get()) is not None:
                    file.write(to_text(line))
                    if self._pending.empty():
                        file.flush()  # also what gzip holds back
                        self._closing.wait(_REST_S)
        except Exception as e:  # a full disk, most likely
            logger.warning("decision_log %s: %s; no further decisions are written", self._path, e)


def _open(file: Path) -> BinaryIO | gzip.GzipFile:
    """Open a log to append to. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".gz":
        return gzip.open(file, "ab", _GZIP_LEVEL)
    plain = file.open("a+b")
    if plain.tell():
        plain.seek(-1, os.SEEK_END)
        if plain.read(1) != b"\n":  # by a server that was killed: what it left must not spoil our first line
            plain.write(b"\n")
    return plain


def to_text(line: Line) -> bytes:
    """Return what is written of a line, its end included."""
    return _WRITERS[type(line)].dump_json(line) + b"\n"
