"""`python -m morphserve replay-log FILE`: does a policy, asked the same again, answer the same?

Reads a decision log of `decision_log_detail: all`, builds the policies from what it says, and feeds them the logged
signals. No engine, no torch: it runs anywhere. With --policy another `policy:` section is asked the same. That is an
open loop: the signals are those that the logged decisions led to, so it says where the two disagree, not what a server
with that policy would have lived through (`scripts/replay.py` does).

Exit status 0 when every decision agrees and nothing is missing, else 1. Last stdout line: one JSON document.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from morphserve.config import MorphServeConfig, load_config, step_times_file
from morphserve.control.decision_log import KIND, Header, LogError, PairReader, read_header
from morphserve.errors import ConfigError
from morphserve.version import __version__
from policies import Decision, Policy, PolicySetup, load_step_times

MakeSetup = Callable[[PolicySetup], PolicySetup]  # from what the log says to what is asked


@dataclass(frozen=True, slots=True)
class Difference:
    """Two answers to one question."""

    line: int
    pair: int
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
    first: Difference | None = None
    logged_levels: Counter[int] = field(default_factory=Counter)  # pairs by level
    replayed_levels: Counter[int] = field(default_factory=Counter)

    @property
    def agrees(self) -> bool:
        """Every decision of a whole log."""
        return not self.problems and self.differing == 0

    def document(self) -> dict[str, Any]:
        """For the last line."""
        return {
            "agrees": self.agrees,
            "compared": self.compared,
            "differing": self.differing,
            "skipped": self.skipped,
            "policies": self.policies,
            "problems": self.problems,
            "notes": self.notes,
            "first_difference": None if self.first is None else asdict(self.first),
            "logged_levels": {str(level): n for level, n in sorted(self.logged_levels.items())},
            "replayed_levels": {str(level): n for level, n in sorted(self.replayed_levels.items())},
        }


class _Replayer:
    """Takes the log line by line."""

    def __init__(self, make_setup: MakeSetup, is_open_loop: bool) -> None:
        self.found = Replay()
        self._make_setup = make_setup
        self._is_open_loop = is_open_loop
        self._header: Header | None = None  # None = lines build on one that is not there, until the next header
        self._policy: Policy | None = None  # None = nobody knows what it has seen, until another one starts
        self._pairs = PairReader()
        self._number = 0  # of the last pair
        self._ended = True

    def take(self, at: int, line: dict[str, Any] | list[Any]) -> None:
        """Line number `at`."""
        try:
            if isinstance(line, list):
                self._take_pair(at, line)
            elif line.get("log") == KIND:
                self._take_header(at, line)
            elif "signals" in line:
                raise LogError("a sample of decisions (decision_log_detail: changes): no policy can be asked again")
            elif line.get("event") == "policy":
                self._take_policy(line)
            elif line.get("event") == "dropped":
                self._take_dropped(at, line)
            elif line.get("event") == "end":
                self._take_end(line)
            else:
                raise LogError("no line that this version writes")
        except LogError as e:
            self.lost(at, str(e))

    def lost(self, at: int, why: str) -> None:
        """Line `at` cannot be used, nor can what builds on it."""
        if self._header is not None or not any(problem.endswith(why) for problem in self.found.problems):
            self.found.problems.append(f"line {at}: {why}")
        self._header = self._policy = None

    def finish(self) -> Replay:
        """No line comes any more."""
        found = self.found
        if not self._ended:
            found.notes.append("the log was not closed: its server was killed, or still runs")
        if not found.compared and not found.problems:
            found.problems.append("no decision in it")
        return found

    def _take_header(self, at: int, line: dict[str, Any]) -> None:
        if not self._ended:
            self.found.notes.append(f"line {at}: the server before was killed; what it had not yet written is missing")
        self._policy, self._pairs, self._number, self._ended = None, PairReader(), 0, False
        self._header = read_header(line)
        if self._header.version != __version__:
            self.found.notes.append(f"line {at}: written by morphserve {self._header.version}, this is {__version__}")
        self._start(self._header, self._header.setup)

    def _take_policy(self, line: dict[str, Any]) -> None:
        if self._header is None:
            return
        try:
            setup = PolicySetup.from_document(line)
        except ValueError as e:
            raise LogError(f"a policy that this version cannot build: {e}") from e
        if not self._is_open_loop or self._policy is None:
            self._start(self._header, setup)

    def _start(self, header: Header, setup: PolicySetup) -> None:
        try:
            chosen = self._make_setup(setup)
            self._policy = chosen.build(header.ladder)
        except ValueError as e:
            raise LogError(f"the policy cannot be built: {e}") from e
        self.found.policies.append(_name(chosen))

    def _take_pair(self, at: int, line: list[Any]) -> None:
        found = self.found
        if self._header is None:
            found.skipped += 1
            if not found.problems:
                raise LogError("decisions without a header before them")
            return
        number, signals, decision = self._pairs.pair(line)
        self._number += 1
        if number != self._number:
            raise LogError(f"pair {number} stands where {self._number} is due")
        if self._policy is None:
            found.skipped += 1
            return
        try:
            answer = self._policy.decide(signals)
        except Exception as e:  # whatever it is, the logged policy did not
            raise LogError(f"the policy fails: {type(e).__name__}: {e}") from e
        found.compared += 1
        found.logged_levels[decision.level] += 1
        found.replayed_levels[answer.level] += 1
        if answer != decision:
            found.differing += 1
            found.first = found.first or Difference(at, number, signals.now_s, decision, answer)

    def _take_dropped(self, at: int, line: dict[str, Any]) -> None:
        """The next pair is whole: it is written as the difference to the last one that was."""
        if not isinstance(pairs := line.get("pairs"), int):
            raise LogError("no number of dropped pairs")
        self._number += pairs
        self._policy = None
        self.found.problems.append(f"line {at}: {pairs} pairs were dropped here, the disk was too slow")

    def _take_end(self, line: dict[str, Any]) -> None:
        self._ended = True
        if self._header is not None and line.get("pairs") != self._number:
            raise LogError(f"the log ends after pair {line.get('pairs')}, the last one here is {self._number}")


def replay(file: Path, other: MorphServeConfig | None = None) -> Replay:
    """Ask again.

    Args:
        file: a decision log.
        other: whose `policy:` is asked in the place of the logged one.

    Raises:
        ConfigError: the file cannot be read, or the other config's step times cannot.
    """
    replayer = _Replayer(lambda logged: _in_place_of(logged, other), other is not None)
    try:
        with file.expanduser().open(encoding="utf-8", errors="replace") as lines:
            for at, text in enumerate(lines, start=1):
                if not text.strip():
                    continue
                try:
                    line = json.loads(text)
                except ValueError:
                    line = None
                if isinstance(line, dict | list):  # a line that was cut lacks its last bracket
                    replayer.take(at, line)
                else:
                    replayer.lost(at, "the line is cut")
    except OSError as e:
        raise ConfigError(f"decision log {file}: {e.strerror}. Give a readable file.") from e
    return replayer.finish()


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
    document = {"file": file, "policy": policy, "open_loop": policy is not None, **found.document()}
    sys.stdout.write(json.dumps(document) + "\n")
    return 0 if found.agrees else 1


def _summary(found: Replay, policy: str | None) -> str:
    lines = [f"asked: {', then '.join(found.policies) or 'nobody'}"]
    if policy is not None:
        lines[0] += f" (of {policy}, in the place of the logged policy: an open loop, the signals stay those that were)"
    lines.append(f"{found.compared} decisions compared, {found.differing} differ, {found.skipped} not comparable")
    if (first := found.first) is not None:
        lines.append(f"first difference: pair {first.pair}, line {first.line}, at {first.now_s:.3f} s")
        lines += [f"  {who:<8} {_told(d)}" for who, d in (("logged", first.logged), ("replayed", first.replayed))]
    if found.logged_levels != found.replayed_levels:
        for who, levels in (("logged", found.logged_levels), ("replayed", found.replayed_levels)):
            shares = (f"{level}: {n / found.compared:.1%}" for level, n in sorted(levels.items()))
            lines.append(f"  {who:<8} decisions by level  {', '.join(shares)}")
    lines += [f"NOT PROVEN  {problem}" for problem in found.problems]
    lines += [f"note: {note}" for note in found.notes]
    lines.append("all decisions agree" if found.agrees else "the log does NOT replay")
    return "\n".join(lines) + "\n"


def _told(decision: Decision) -> str:
    limit = "" if decision.max_queued_tokens is None else f", at most {decision.max_queued_tokens} tokens queued"
    return f"level {decision.level} ({decision.reason}){limit}"
