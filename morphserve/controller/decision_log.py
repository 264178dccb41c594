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
from typing import TextIO

from morphserve.errors import ConfigError
from policies.types import Decision, Signals

logger = logging.getLogger(__name__)

_MAX_PENDING = 1024  # lines; beyond that the disk is too slow and lines are dropped, and counted
_REPEAT_S = 1.0  # how often an unchanged decision is written
_CLOSE_TIMEOUT_S = 5.0

Entry = tuple[float, Signals, Decision, bool]


class DecisionLog:
    """One line for every changed decision, and one a second at most while nothing changes.

    A line: {"wall_s", "changed", "level" (wanted), "reason", "kv_usage", "signals": {...}}.
    """

    def __init__(self, path: Path, *, wall_clock: Callable[[], float] = time.time) -> None:
        """Open `path` for appending and start the writer.

        Raises:
            ConfigError: the file cannot be written.
        """
        file = path.expanduser()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = file.open("a", encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"decision_log {file}: {e.strerror}. Give a file that can be written.") from e
        self.num_dropped = 0
        self._wall_clock = wall_clock
        self._last: Decision | None = None
        self._last_s = float("-inf")
        self._pending: Queue[Entry | None] = Queue(_MAX_PENDING)
        self._writer = threading.Thread(target=self._write, name="morphserve-decision-log", daemon=True)
        self._writer.start()

    def record(self, signals: Signals, decision: Decision) -> None:
        """Queue a line if it says something new. Never blocks."""
        # The reason of an unchanged level may carry figures that move: only the level counts as change.
        changed = self._last is None or decision.level != self._last.level
        if not changed and signals.now_s - self._last_s < _REPEAT_S:
            return
        self._last, self._last_s = decision, signals.now_s
        try:
            self._pending.put_nowait((self._wall_clock(), signals, decision, changed))
        except Full:
            self.num_dropped += 1

    def close(self) -> None:
        """Write what is queued and close the file. May be called twice."""
        if self._writer.is_alive():
            try:
                self._pending.put(None, timeout=_CLOSE_TIMEOUT_S)
            except Full:
                logger.warning("decision_log: no line written for %.0f s; the rest is lost", _CLOSE_TIMEOUT_S)
                return
            self._writer.join(_CLOSE_TIMEOUT_S)

    def _write(self) -> None:
        with self._file as file:
            try:
                while (entry := self._pending.get()) is not None:
                    file.write(_to_line(entry))
                    if self._pending.empty():
                        file.flush()
            except OSError as e:
                logger.warning("decision_log %s: %s; no further decisions are written", file.name, e)
                while self._pending.get() is not None:  # keep taking, so that close() never waits for room
                    self.num_dropped += 1


def _to_line(entry: Entry) -> str:
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
