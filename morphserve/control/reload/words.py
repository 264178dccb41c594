"""Words for what has changed in the settings, and for what is wrong with them: with values in the log, else without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from morphserve.config import MorphServeConfig
from morphserve.errors import ConfigError, MorphServeError
from policies import PolicySetup


class Told(ConfigError):
    """A refusal that names keys at most, no values."""


def changes(old: BaseModel, new: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, value before, value now) of what differs, sections taken apart where they are of one kind."""
    for name in type(old).model_fields:
        before, now = getattr(old, name), getattr(new, name)
        if isinstance(before, BaseModel) and type(before) is type(now):
            yield from changes(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name}", before, now


def message(error: Exception) -> str:
    return str(error) if isinstance(error, MorphServeError) else f"{type(error).__name__}: {error}"


def without_values(error: Exception) -> str:
    """Say what is wrong with a file by keys and places alone."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(error, Told):
        return str(error)
    what = "this policy cannot be served"
    if isinstance(cause, ValidationError):
        places = (".".join(str(part) for part in e["loc"] if part in _own_keys()) for e in cause.errors())
        what = f"wrong or unknown at {', '.join(dict.fromkeys(place or 'the top' for place in places))}"
    elif isinstance(cause, yaml.MarkedYAMLError) and cause.problem_mark is not None:
        what = f"no YAML from line {cause.problem_mark.line + 1} on"
    elif isinstance(cause, OSError):
        what = "it cannot be read"
    return f"{what}. The server's log has the values."


@cache
def _own_keys() -> frozenset[str]:
    """Return every key that the settings may have: all others are somebody's own."""
    schema = MorphServeConfig.model_json_schema()
    sections = (schema, *schema["$defs"].values())
    return frozenset(key for section in sections for key in section.get("properties", ()))


def difference(old: PolicySetup, new: PolicySetup) -> Iterator[tuple[str, str]]:
    """Yield the keys that differ, each with the values in words."""
    if type(old.section) is not type(new.section):
        yield "policy.kind", f"{old.section.kind} -> {new.section.kind}"
        return
    for key, before, now in changes(old.section, new.section, "policy."):
        yield key, f"{before!r} -> {now!r}"
    if old.times != new.times:
        yield "step times", ""
