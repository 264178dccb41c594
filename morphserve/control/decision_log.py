"""Signals and decisions as JSON lines, written by a thread so that no step waits for a disk.

A log that replays has a header, then what changed from one (signals, decision) pair to the next:

    {"log": "morphserve decisions", "schema": 1, ...}  everything a policy is made of; a restarted server writes its own
    [7, [0, 12.5, 4, 31], [2, "kv_usage 0.91 > 0.85", null]]  pair 7: values of changed signals by their index, decision
    [8, [0, 12.54]]                                           pair 8: the same decision
    {"event": "policy", ...}   from the next pair on another policy answers, which has seen nothing yet
    {"event": "dropped", "pairs": 3}   the disk was too slow: so many pairs are missing here
    {"event": "end", "pairs": 9}       the log was closed in order

Floats are written so that they come back bit by bit. `last_step` is written whenever it is another step, even an equal
one: a policy may count steps by identity.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from queue import Full, Queue
from typing import Any, TextIO

from morphserve.errors import ConfigError
from morphserve.version import __version__
from policies import Cohort, Decision, Ladder, MorphLevel, PolicySetup, Signals, StepLoad

logger = logging.getLogger(__name__)

SCHEMA = 1
KIND = "morphserve decisions"

_FIELDS = {cls: tuple(field.name for field in fields(cls)) for cls in (Signals, Cohort, StepLoad)}
_SIGNAL_VALUES = attrgetter(*_FIELDS[Signals])
_VALUES = {cls: attrgetter(*_FIELDS[cls]) for cls in (Cohort, StepLoad)}
_WAITING = _FIELDS[Signals].index("waiting")
_LAST_STEP = _FIELDS[Signals].index("last_step")
_ABSENT = object()

_MAX_PENDING = 1024  # lines; beyond that the disk is too slow and lines are dropped, and counted
_REPEAT_S = 1.0  # how often an unchanged decision is written
_CLOSE_TIMEOUT_S = 5.0
_BATCH_S = 0.1  # every pair: the writer rests so long, because waking it costs a step more than what it then writes

Entry = tuple[float, Signals, Decision, bool]  # wall clock, what was asked and answered, a new level
Event = dict[str, Any]
Pair = tuple[int, Signals, Decision]  # its number, counted from 1


class DecisionLog:
    """One line for every changed decision, and one a second at most while nothing changes; or, with a header, every
    pair of signals and decision, which `python -m morphserve replay-log` can ask again.

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


class LogError(ValueError):
    """A line that is not what this version writes."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a log starts with."""

    setup: PolicySetup
    ladder: Ladder
    version: str  # of the package that wrote it
    engine: int = 0  # data-parallel index

    def document(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "log": KIND,
            "schema": SCHEMA,
            "morphserve": self.version,
            "engine": self.engine,
            "fields": list(_FIELDS[Signals]),
            "cohort_fields": list(_FIELDS[Cohort]),
            "step_fields": list(_FIELDS[StepLoad]),
            "ladder": [asdict(level) for level in self.ladder],
            **self.setup.document(),
        }


def make_header(setup: PolicySetup, ladder: Ladder, engine: int = 0) -> Header:
    """Of a log that this version writes."""
    return Header(setup, ladder, __version__, engine)


def read_header(raw: Mapping[str, Any]) -> Header:
    """What `Header.document` wrote.

    Raises:
        LogError: another schema, other signals, or a policy that this version cannot build.
    """
    if raw.get("schema") != SCHEMA:
        raise LogError(f"schema {raw.get('schema')!r}, this version replays {SCHEMA}")
    for name, cls in (("fields", Signals), ("cohort_fields", Cohort), ("step_fields", StepLoad)):
        if raw.get(name) != list(_FIELDS[cls]):
            other = sorted(set(raw.get(name) or ()) ^ set(_FIELDS[cls])) or "their order"
            raise LogError(f"its {cls.__name__} are not those of this version, the difference: {other}")
    try:
        ladder = tuple(map(_read_level, raw["ladder"]))
        return Header(PolicySetup.from_document(raw), ladder, str(raw["morphserve"]), int(raw["engine"]))
    except (KeyError, TypeError, ValueError) as e:
        raise LogError(f"the header does not say what the policy was made of ({type(e).__name__}: {e})") from e


def _read_level(raw: Mapping[str, Any]) -> MorphLevel:
    """Earlier logs have no `time_factors`."""
    factors = tuple((int(num_seqs), float(factor)) for num_seqs, factor in raw.get("time_factors", ()))
    return MorphLevel(**{**raw, "layer_formats": tuple(raw["layer_formats"]), "time_factors": factors})


class PairWriter:
    """Turns pairs into lines, each as the difference to the one before."""

    def __init__(self) -> None:
        self._values: tuple[Any, ...] = (_ABSENT,) * len(_FIELDS[Signals])
        self._decision: Decision | None = None

    def line(self, number: int, signals: Signals, decision: Decision) -> str:
        """The line of pair `number`."""
        changes: list[Any] = []
        values = _SIGNAL_VALUES(signals)
        for index, (new, old) in enumerate(zip(values, self._values, strict=True)):
            if new is not old and not _is_same_number(new, old):
                changes += (index, new)
        self._values = values
        line: list[Any] = [number, changes]
        if decision is not self._decision and decision != self._decision:
            line.append((decision.level, decision.reason, decision.max_queued_tokens))
        self._decision = decision
        return json.dumps(line, separators=(",", ":"), default=_plain) + "\n"


class PairReader:
    """The way back."""

    def __init__(self) -> None:
        self._values: list[Any] = [_ABSENT] * len(_FIELDS[Signals])
        self._decision: Decision | None = None

    def pair(self, line: list[Any]) -> tuple[int, Signals, Decision]:
        """Number, signals and decision of the next line.

        Raises:
            LogError: no such line can follow the ones before.
        """
        try:
            number, changes, *decision = line
            for index, value in zip(changes[::2], changes[1::2], strict=True):
                self._values[index] = _rich(index, value)
            if decision:
                self._decision = Decision(*decision[0])
        except (TypeError, ValueError, LookupError) as e:
            raise LogError(f"no pair of signals and decision ({e})") from e
        if not isinstance(number, int) or _ABSENT in self._values or self._decision is None:
            raise LogError("a pair that builds on lines which are not there")
        return number, Signals(*self._values), self._decision


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


def _is_same_number(new: object, old: object) -> bool:
    """Told apart: 0.0 and -0.0, 1 and 1.0, NaN from anything. What is no number is the same only when identical."""
    return type(new) is type(old) and isinstance(new, int | float) and new == old and bool(new)


def _plain(value: Any) -> Any:
    return _VALUES[type(value)](value)


def _rich(index: int, value: Any) -> Any:
    if index == _WAITING:
        return tuple(Cohort(*cohort) for cohort in value)
    if index == _LAST_STEP:
        return None if value is None else StepLoad(*value)
    return value
