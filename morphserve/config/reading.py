"""Settings as they come, a file, a mapping or a text that somebody sent, read strictly: what is wrong in few words."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from morphserve.config.sections import MorphServeConfig
from morphserve.errors import ConfigError
from morphserve.user_input import parse_yaml, read_yaml, user_path
from policies import PolicyConfig

_MAX_SHOWN = 200  # characters of a value in a message
_MAX_WORDS = 500  # characters of a message about what somebody has sent


def load_config(path: str | Path) -> MorphServeConfig:
    """Read and check a YAML file.

    Raises:
        ConfigError: unreadable file, YAML syntax, unknown key, value out of bounds.
    """
    file = user_path(path)
    raw = read_yaml(file, "--morphserve-config")
    if raw is None:
        raise ConfigError(f"{file} is empty. Write what is to differ from the defaults, or leave the file out.")
    return parse_config(raw, source=str(file))


def parse_config(raw: object, source: str = "morphserve config") -> MorphServeConfig:
    """Check an already loaded mapping (`additional_config={"morphserve": {...}}`)."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: top level is {type(raw).__name__}, must be a mapping.")
    try:
        return MorphServeConfig.model_validate(raw)
    except ValidationError as e:
        lines = problem_lines(e)
        raise ConfigError(
            f"{source}: {len(lines)} problem(s):\n" + "\n".join(lines)
            + "\nEvery key and its bounds: `morphserve init` writes them."
        ) from e


def parse_policy(text: str, source: str) -> PolicyConfig:
    """Check a `policy:` section alone, in JSON or YAML that anybody may have sent.

    Raises:
        ConfigError: in one line, whatever the text is.
    """
    try:
        raw = _plain_values(text)
        if not isinstance(raw, dict) or set(raw) != {"policy"}:
            found = ", ".join(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__
            raise ConfigError(f"top level is {found or 'empty'}, must be `policy` alone: the rest needs a restart")
        return MorphServeConfig.model_validate(raw).policy
    except ValidationError as e:
        why = "; ".join(line.strip() for line in problem_lines(e))
    except ConfigError as e:
        why = str(e)
    raise ConfigError(f"{source}: {' '.join(why.split())[:_MAX_WORDS]}")


def _plain_values(text: str) -> object:
    """Load JSON, or YAML without aliases, of which a short text makes a value too long to be written into a message."""
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError):
        return parse_yaml(text, with_aliases=False)


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ConfigError(f"a key of {', '.join(key for key, _ in pairs)} is given twice; leave one out")
    return found


def problem_lines(error: ValidationError) -> list[str]:
    """Return one line a problem: where it stands, what is wrong, what was given."""
    return [
        f"  {'.'.join(str(p) for p in problem['loc']) or '(root)'}: {problem['msg']} (got {_shown(problem['input'])})"
        for problem in error.errors()
    ]


def _shown(value: object) -> str:
    try:
        shown = repr(value)
    except RecursionError:
        shown = type(value).__name__
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
