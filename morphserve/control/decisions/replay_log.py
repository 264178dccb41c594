"""A decision log read again, its policies asked the same questions; `morphserve replay-log` prints what came of it.

A line that cannot be used, or a gap, is a problem: what comes after it proves nothing until a policy starts anew.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from morphserve.config import MorphServeConfig, load_config, step_times_file
from morphserve.control.decisions.decision_log import SCHEMA, Header, Line, Mark, Row
from morphserve.errors import ConfigError
from morphserve.user_input import user_path
from morphserve.version import __version__
from policies import Decision, Policy, PolicySetup, StepLoad, ask, load_step_times, succeed

LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="event")])
# Where a gzip member starts, of Python or gzip(1): 44 fixed bits, so no other bytes of a log will look like it.
_MEMBER = re.compile(rb"(?=\x1f\x8b\x08[\0\x08].{4}[\0\2\4][\3\xff])", re.DOTALL)
_CHUNK_BYTES = 1 << 16
_LONGEST_LINE = 1 << 24  # bytes; a header with its step times has some thousands


class LogError(ValueError):
    """A line that is not what this version writes."""


def read_log(file: Path) -> Iterator[tuple[int, Line | LogError]]:
    """Read lines with their numbers, from 1; for one that cannot be used, the error that says why.

    Raises:
        OSError: the file cannot be read, or is none: a device, a pipe.
        ConfigError: it has a line that no log has.
    """
    for at, text in enumerate(_texts(file), start=1):
        if len(text) > _LONGEST_LINE:
            raise ConfigError(
                f"decision log {file}: line {at} is longer than {_LONGEST_LINE:,} bytes, which none of a log is. "
                "Give a file that MorphServe has written."
            )
        if text.strip():
            try:
                yield at, LINE.validate_json(text)
            except ValidationError as error:
                yield at, LogError(_why(text, error))


def _why(text: bytes, error: ValidationError) -> str:
    try:
        raw = from_json(text)
    except ValueError:
        return "the line is cut or damaged"
    raw = raw if isinstance(raw, dict) else {}
    schema = raw.get("schema", SCHEMA if "event" in raw else 1)
    if schema != SCHEMA:
        return (
            f"schema {schema}, written by morphserve {raw.get('morphserve', '0.1.0 or earlier')}; this version reads "
            f"schema {SCHEMA}. Replay it with the version that wrote it."
        )
    wrong = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
    return f"no line that this version writes ({'; '.join(wrong)})"


def _texts(file: Path) -> Iterator[bytes]:
    """Yield the lines. Of a gzip file each member for itself: one that a kill has torn ends where the next starts."""
    with open(file, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as raw:  # a pipe: no wait
        if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file")
        if raw.peek(2)[:2] != b"\x1f\x8b":
            yield from iter(lambda: raw.readline(_LONGEST_LINE + 1), b"")
            return
        packed = raw.read()
    for member in _MEMBER.split(packed):
        stream, rest = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), b""
        try:
            for at in range(0, len(member), _CHUNK_BYTES):
                *lines, rest = (rest + stream.decompress(member[at : at + _CHUNK_BYTES])).split(b"\n")
                yield from lines
                if len(rest) > _LONGEST_LINE:  # a line that goes on and on is told of before it is whole
                    break
        except zlib.error:
            rest = rest or b"?"  # at least a line that is damaged
        if rest:
            yield rest


@dataclass(frozen=True, slots=True)
class Difference:
    """Two answers to one question."""

    file: str  # that the line stands in
    line: int
    pair: int  # `Row.seq`
    now_s: float
    logged: Decision
    replayed: Decision


@dataclass(slots=True)
class Replay:
    """What came out."""

    compared: int = 0
    differing: int = 0
    skipped: int = 0  # after a gap, where nobody can say what state the policy was in
    policies: list[str] = field(default_factory=list)  # that were asked, one after the other
    problems: list[str] = field(default_factory=list)  # each of them says what is not proven
    notes: list[str] = field(default_factory=list)
    first_difference: Difference | None = None
    logged_levels: dict[int, int] = field(default_factory=dict)  # decisions by level
    replayed_levels: dict[int, int] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Every decision of a whole log."""
        return not self.problems and self.differing == 0


class _Replayer:
    """Takes the log line by line."""

    def __init__(self, other: MorphServeConfig | None) -> None:
        self.found = Replay()
        self.file = ""  # where the lines stand, if there are several
        self._other = other  # asked in the place of the logged policy
        self._header: Header | None = None  # None = nothing can be used until a log starts
        self._policy: Policy | None = None  # None = nobody knows what it has seen, until another one starts
        self._setup: PolicySetup | None = None  # of the last one
        self._seq: int | None = 0  # of the last row; None = of a file that is not here
        self._step: StepLoad | None = None  # the newest

    def take(self, at: int, line: Line | LogError) -> None:
        """Line number `at`."""
        found = self.found
        try:
            match line:
                case LogError():
                    raise line
                case Header(event="start"):
                    self._start(at, line)
                case Header(event="continued"):
                    self._go_on(at, line)
                case _ if self._header is None:
                    found.skipped += isinstance(line, Row)
                    raise LogError("nothing says what policy was asked: the start is missing")
                case Header():
                    self._ask_from_now_on(line)
                case Row():
                    self._ask(at, line)
                case Mark(event="dropped"):
                    lost = line.seq - (self._seq or 0)
                    where = self._line(at)
                    found.problems.append(f"{where}: {lost} decisions were dropped here, the disk was slow or full")
                    self._seq, self._policy = line.seq, None
                case Mark():
                    if line.seq != (line.seq if self._seq is None else self._seq):
                        raise LogError(f"the log ends after decision {line.seq}, the last one here is {self._seq}")
                    self._header = None
        except LogError as e:  # nor can what builds on this line be used, which need not be said again
            if self._header is not None or not found.problems:
                found.problems.append(f"{self._line(at)}: {e}")
            self._header = self._policy = None

    def finish(self) -> Replay:
        """Return what came out: no line comes any more."""
        found = self.found
        if self._header is not None:
            found.notes.append("the log was not closed: its server was killed, or still runs")
        if not found.compared and not found.problems:
            found.problems.append("no decision in it")
        return found

    def _start(self, at: int, header: Header) -> None:
        notes = self.found.notes
        if self._header is not None:
            notes.append(f"{self._line(at)}: the server before was killed; what it had not yet written is missing")
        self._header, self._policy, self._seq, self._step = header, None, 0, None
        if header.detail == "changes":
            raise LogError("a sample of decisions (decision_log_detail: changes): no policy can be asked again")
        if header.morphserve != __version__:
            notes.append(f"{self._line(at)}: written by morphserve {header.morphserve}, this is {__version__}")
        self._ask_from_now_on(header)

    def _go_on(self, at: int, header: Header) -> None:
        """Take the first line of a file that goes on where an older one ends, which may not be here any more."""
        if self._header is not None:
            return
        self._header, self._setup, self._policy, self._seq = header, header.setup, None, None
        if header.detail == "changes":
            raise LogError("a sample of decisions (decision_log_detail: changes): no policy can be asked again")
        self.found.problems.append(
            f"{self._line(at)}: the file before this one is not here; what the policy had seen nobody can say"
        )

    def _line(self, at: int) -> str:
        return f"{self.file}line {at}"

    def _ask_from_now_on(self, header: Header) -> None:
        """Ask another policy from now on; the one of an open loop goes on.

        It knows what the controller tells a new one (`succeed`), and nothing else.
        """
        if self._other is not None and self._policy is not None:
            return
        last, last_setup, is_first = self._policy, self._setup, header.event == "start"
        try:
            self._setup = setup = _in_place_of(header.setup, self._other)
            self._policy = setup.build(header.ladder)
        except ValueError as e:
            raise LogError(f"the policy cannot be built: {e}") from e
        self.found.policies.append(_name(setup))
        if last is not None and not is_first:
            succeed(self._policy, last)
        elif not is_first and last_setup is not None and setup.inherits(last_setup):
            self._policy = None  # what it took over comes of rows that are missing

    def _ask(self, at: int, row: Row) -> None:
        self._seq = row.seq if self._seq is None else self._seq + 1
        if row.seq != self._seq:
            raise LogError(f"decision {row.seq} stands where {self._seq} is due")
        found, signals = self.found, row.signals
        if row.new_step:
            self._step = signals.last_step
        elif signals.last_step is not None:
            signals = replace(signals, last_step=self._step)
        if self._policy is None:
            found.skipped += 1
            return
        try:
            answer = ask(self._policy, signals)
        except Exception as e:  # whatever it is, the logged policy did not
            raise LogError(f"the policy fails: {type(e).__name__}: {e}") from e
        found.compared += 1
        for levels, decision in ((found.logged_levels, row.decision), (found.replayed_levels, answer)):
            levels[decision.level] = levels.get(decision.level, 0) + 1
        if answer != row.decision:
            found.differing += 1
            found.first_difference = found.first_difference or Difference(
                self.file, at, row.seq, signals.now_s, row.decision, answer
            )


def replay(file: Path, other: MorphServeConfig | None = None) -> Replay:
    """Ask again.

    Args:
        file: a decision log; older files are read with it, as far back as it goes on from them.
        other: whose `policy:` is asked in the place of the logged one.

    Raises:
        ConfigError: the file cannot be read.
    """
    replayer = _Replayer(other)
    try:
        files = _files_of(user_path(file))
        for part in files:
            replayer.file = f"{part.name}, " if len(files) > 1 else ""
            for at, line in read_log(part):
                replayer.take(at, line)
    except OSError as e:
        raise ConfigError(f"decision log {file}: {e.strerror}. Give a readable file.") from e
    return replayer.finish()


def _files_of(file: Path) -> list[Path]:
    """Return the files of a log, the oldest first."""
    name, number = (file.stem, int(file.suffix[1:])) if file.suffix[1:].isdecimal() else (file.name, 0)
    found = [file]
    while True:
        _, first = next(read_log(found[0]), (0, None))
        number += 1
        older = file.with_name(f"{name}.{number}")
        if not (isinstance(first, Header) and first.event == "continued" and older.is_file()):
            return found
        found.insert(0, older)


def _in_place_of(logged: PolicySetup, other: MorphServeConfig | None) -> PolicySetup:
    if other is None:
        return logged
    file = step_times_file(other) if other.policy.kind == "slo" else None
    times = logged.times if file is None else load_step_times(file)
    return PolicySetup(other.policy, times if other.policy.kind == "slo" else None, logged.limits)


def _name(setup: PolicySetup) -> str:
    mode = getattr(setup.section, "mode", None) or getattr(setup.section, "level", "")
    return f"{setup.section.kind} {mode}"


def print_replay(file: str, policy: str | None) -> int:
    """Replay a decision log, print what came of it, and answer with the exit status of the command."""
    try:
        found = replay(Path(file), None if policy is None else load_config(policy))
    except ConfigError as e:
        sys.stderr.write(f"morphserve replay-log: {e}\n")
        return 1
    sys.stdout.write(_summary(found, policy))
    asked = {"file": file, "policy": policy, "open_loop": policy is not None}
    sys.stdout.write(json.dumps({**asked, "agrees": found.agrees, **asdict(found)}) + "\n")
    return 0 if found.agrees else 1


def _summary(found: Replay, policy: str | None) -> str:
    lines = [f"asked: {', then '.join(found.policies) or 'nobody'}"]
    if policy is not None:
        lines[0] += f" (of {policy}, in the place of the logged policy: an open loop, the signals stay those that were)"
    lines.append(f"{found.compared} decisions compared, {found.differing} differ, {found.skipped} not comparable")
    if (first := found.first_difference) is not None:
        lines.append(f"first difference: decision {first.pair}, {first.file}line {first.line}, at {first.now_s:.3f} s")
        lines += [f"  {who:<8} {_in_words(d)}" for who, d in (("logged", first.logged), ("replayed", first.replayed))]
    if found.logged_levels != found.replayed_levels:
        for who, levels in (("logged", found.logged_levels), ("replayed", found.replayed_levels)):
            shares = (f"{level}: {n / found.compared:.1%}" for level, n in sorted(levels.items()))
            lines.append(f"  {who:<8} decisions by level  {', '.join(shares)}")
    lines += [f"NOT PROVEN  {problem}" for problem in found.problems]
    lines += [f"note: {note}" for note in found.notes]
    lines.append("all decisions agree" if found.agrees else "the log does NOT replay")
    return "\n".join(lines) + "\n"


def _in_words(decision: Decision) -> str:
    limit = "" if decision.max_queued_tokens is None else f", at most {decision.max_queued_tokens} tokens queued"
    floor = f", none that asks for a level above {decision.min_floor}" if decision.min_floor else ""
    return f"level {decision.level} ({decision.reason}){limit}{floor}"
