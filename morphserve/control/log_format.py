"""Lines of a decision log that replays: a header, then what changed from one (signals, decision) pair to the next.

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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from typing import Any

from morphserve.version import __version__
from policies import Cohort, Decision, Ladder, MorphLevel, PolicySetup, Signals, StepLoad

SCHEMA = 1
KIND = "morphserve decisions"

_FIELDS = {cls: tuple(field.name for field in fields(cls)) for cls in (Signals, Cohort, StepLoad)}
_SIGNAL_VALUES = attrgetter(*_FIELDS[Signals])
_VALUES = {cls: attrgetter(*_FIELDS[cls]) for cls in (Cohort, StepLoad)}
_WAITING = _FIELDS[Signals].index("waiting")
_LAST_STEP = _FIELDS[Signals].index("last_step")
_ABSENT = object()


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
