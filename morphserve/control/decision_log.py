"""Signals and decisions as JSON lines, written by a thread so that no step waits for a disk."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from queue import Full, Queue
from typing import Any, TextIO

from morphserve.control.log_format import Header, PairWriter
from morphserve.errors import ConfigError
from policies import Decision, Signals

logger = logging.getLogger(__name__)

_MAX_PENDING = 1024  # lines; beyond that the disk is too slow and lines are dropped, and counted
_REPEAT_S = 1.0  # how often an unchanged decision is written
_CLOSE_TIMEOUT_S = 5.0
_BATCH_S = 0.1  # every pair: the writer rests so long, because waking it costs a step more than what it then writes

Entry = tuple[float, Signals, Decision, bool]  # wall clock, what was asked and answered, a new level
Event = dict[str, Any]
Pair = tuple[int, Signals, Decision]  # its number, counted from 1


class DecisionLog:
    """One line for every changed decision, and one a second at most while nothing changes; or, with a header, every
    pair of signals and decision, which `python -m morphserve replay-log` can ask again (see `log_format`).

    A line without a header: {"wall_s", "changed", "level" (wanted), "reason", "kv_usage", "signals": {...}}. Every pair
    is about 120 bytes, and costs a step 14 us and the writer 30 us (`scripts/bench_controller.py --steps 1500
    --pace-ms 4 --decision-log all`, on a busy machine where a tick without a log takes 66 us at that pace).
    """

    def __init__(
        self, path: Path, *, header: Header | None = None, wall_clock: Callable[[], float] = time.time
    ) -> None:
        """Open `path` for appending and start the writer.

        Args:
            path: of the file; directories are made.
            header: write every pair, after this; None = a sample of them.
            wall_clock: seconds since the epoch.

        Raises:
            ConfigError: the file cannot be written.
        """
        file = path.expanduser()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            is_cut = _ends_in_mid_line(file)
            self._file: TextIO = file.open("a", encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"decision_log {file}: {e.strerror}. Give a file that can be written.") from e
        self.num_dropped = 0
        self._wall_clock = wall_clock
        self._last: Decision | None = None
        self._last_s = float("-inf")
        self._pairs = None if header is None else PairWriter()
        self._num_pairs = 0
        self._events: list[Event] = []  # what must be written before the next pair
        self._gap: Event | None = None  # the newest of them, while pairs are being dropped
        self._closing = threading.Event()
        self._pending: Queue[Entry | Pair | Event | None] = Queue(_MAX_PENDING)
        if is_cut:  # by a server that was killed: what it left must not spoil our first line
            self._file.write("\n")
        if header is not None:
            self._pending.put({**header.document(), "wall_s": wall_clock()})
        self._writer = threading.Thread(target=self._write, name="morphserve-decision-log", daemon=True)
        self._writer.start()

    def record(self, signals: Signals, decision: Decision) -> None:
        """Queue a line if it says something new. Never blocks."""
        if self._pairs is not None:
            self._record_pair(signals, decision)
            return
        # The reason of an unchanged level may carry figures that move: only the level counts as change.
        changed = self._last is None or decision.level != self._last.level
        if not changed and signals.now_s - self._last_s < _REPEAT_S:
            return
        self._last, self._last_s = decision, signals.now_s
        try:
            self._send_events()
            self._pending.put_nowait((self._wall_clock(), signals, decision, changed))
        except Full:
            self.num_dropped += 1

    def policy_changed(self, note: str, document: dict[str, Any]) -> None:
        """From the next line on another policy answers. Never blocks, and is never dropped before that line."""
        self._gap = None
        self._events.append({"event": "policy", "wall_s": self._wall_clock(), "note": note, **document})

    def close(self) -> None:
        """Write what is queued and close the file. May be called twice."""
        if self._writer.is_alive():
            self._closing.set()
            last: list[Event | None] = [*self._events]
            if self._pairs is not None:
                last.append({"event": "end", "pairs": self._num_pairs})
            self._events = []
            try:
                for event in [*last, None]:
                    self._pending.put(event, timeout=_CLOSE_TIMEOUT_S)
            except Full:
                logger.warning("decision_log: no line written for %.0f s; the rest is lost", _CLOSE_TIMEOUT_S)
                return
            self._writer.join(_CLOSE_TIMEOUT_S)

    def _record_pair(self, signals: Signals, decision: Decision) -> None:
        self._num_pairs += 1
        try:
            if self._events:
                self._send_events()
            self._pending.put_nowait((self._num_pairs, signals, decision))
        except Full:
            self.num_dropped += 1
            if self._gap is None:
                self._gap = {"event": "dropped", "pairs": 0}
                self._events.append(self._gap)
            self._gap["pairs"] += 1

    def _send_events(self) -> None:
        """Raises Full when some of them have to wait for the next pair."""
        while self._events:
            self._pending.put_nowait(self._events[0])
            if self._events.pop(0) is self._gap:
                self._gap = None

    def _write(self) -> None:
        with self._file as file:
            try:
                while (entry := self._pending.get()) is not None:
                    file.write(self._to_line(entry))
                    if self._pending.empty():
                        file.flush()
                        if self._pairs is not None:
                            self._closing.wait(_BATCH_S)
            except Exception as e:  # a full disk, most likely
                logger.warning("decision_log %s: %s; no further decisions are written", file.name, e)
                while self._pending.get() is not None:  # keep taking, so that close() never waits for room
                    self.num_dropped += 1

    def _to_line(self, entry: Entry | Pair | Event) -> str:
        if isinstance(entry, dict):
            return json.dumps(entry, separators=(",", ":")) + "\n"
        if len(entry) == 3:
            assert self._pairs is not None
            return self._pairs.line(*entry)
        return _sample(entry)


def _sample(entry: Entry) -> str:
    wall_s, signals, decision, changed = entry
    line = {
        "wall_s": wall_s,
        "changed": changed,
        "level": decision.level,
        "reason": decision.reason,
        "kv_usage": signals.kv_usage,
        "signals": asdict(signals),
    }
    return json.dumps(line, separators=(",", ":")) + "\n"


def _ends_in_mid_line(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size == 0:
        return False
    with file.open("rb") as raw:
        raw.seek(-1, 2)
        return raw.read(1) != b"\n"
