"""Paths, YAML and tokens as people give them, read strictly, within bounds; what is wrong in one line."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from morphserve.errors import ConfigError

MAX_BYTES = 1 << 20  # a config has some thousands
_LONGEST_NAME = 255  # bytes, as Linux has it
_MAX_DEPTH = 30
_MAX_VALUES = 100_000  # with aliases written out, of which a few lines can make billions
_LEAST_TOKEN, _LONGEST_TOKEN = 16, 512  # characters
_TOKEN = re.compile(f"[!-~]{{{_LEAST_TOKEN},{_LONGEST_TOKEN}}}")
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


def user_path(text: str | Path) -> Path:
    """Return a path as its user means it: with `~` and `~name` written out.

    Raises:
        ConfigError: there is no such user, or no file can have that name.
    """
    try:
        named = b"\0" not in (name := os.fsencode(text)) and max(map(len, name.split(b"/"))) <= _LONGEST_NAME
        path = Path(text).expanduser()
    except RuntimeError as e:
        raise ConfigError(f"{text}: nobody here has that home directory. Write the path out, or set HOME.") from e
    except UnicodeEncodeError:
        named = False
    if not named:
        raise ConfigError(f"{str(text)[:_LONGEST_NAME]!r} is no path: too long, or of what no name has. Write another.")
    return path


def read_token(file: Path) -> str:
    """Return the token that a file holds: a line of its own, which only the file's owner can read.

    As PostgreSQL takes private keys: the file is ours and 0600 or less, or root's and 0640 or less.

    Raises:
        ConfigError: the file cannot be read, others can read it, or what it holds is no token.
    """
    file = user_path(file)
    try:
        with open(file, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
            found = os.fstat(stream.fileno())
            text = stream.read(_LONGEST_TOKEN + 2) if stat.S_ISREG(found.st_mode) else b""
    except OSError as e:
        raise ConfigError(f"token file {file}: {e.strerror}. Give a file that this user can read.") from e
    mode, owner = stat.S_IMODE(found.st_mode), found.st_uid
    is_private = owner in (0, os.geteuid()) and not mode & (0o037 if owner == 0 else 0o077)
    if not (is_private and stat.S_ISREG(found.st_mode)):
        raise ConfigError(
            f"token file {file}: mode {mode:04o}, owner {owner}: others can read it, or can have written it. It must "
            f"be this user's alone: chmod 600 {file}"
        )
    token = text.decode("ascii", "replace").strip()
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"token file {file}: must hold one line, {_LEAST_TOKEN} to {_LONGEST_TOKEN} printable ASCII characters "
            f"without a space. Make one: (umask 077; openssl rand -hex 32 > {file})"
        )
    return token


def read_tokens(admin: Path | None, read: Path | None) -> tuple[str | None, str | None]:
    """Return the token that changes something, and the one that looks; None of no file.

    Raises:
        ConfigError: see `read_token`; or the two are the same, so that whoever may look could change something.
    """
    tokens = None if admin is None else read_token(admin), None if read is None else read_token(read)
    if admin is not None and tokens[0] == tokens[1]:
        raise ConfigError(f"token files {admin} and {read} hold the same token. Give {read} another, or leave it out.")
    return tokens


def read_yaml(file: Path, what: str) -> Any:
    """Return the value in a YAML file; None of one that has only comments or nothing in it.

    Args:
        file: whose `~` is expanded.
        what: it is, for messages: an option, or a noun.

    Raises:
        ConfigError: unreadable, not YAML, a key given twice, or beyond what a config can need.
    """
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as e:  # a name with a null character is a ValueError
        raise ConfigError(f"{what} {file}: {getattr(e, 'strerror', None) or e}. Give a readable YAML file.") from e
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{what} {file}: more than {MAX_BYTES:,} bytes, which no config has. Give a YAML file.")
    try:
        return parse_yaml(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise ConfigError(f"{what} {file}: not UTF-8 text ({e.reason} at byte {e.start}).") from e
    except ConfigError as e:
        raise ConfigError(f"{what} {file}: {e}") from e


def parse_yaml(text: str, *, with_aliases: bool = True) -> Any:
    """Return the value of a text. A date or a time stays the text that it is: no setting is one.

    Args:
        text: that a user wrote.
        with_aliases: whether `*name` may stand for what was written before.

    Raises:
        ConfigError: see `read_yaml`.
    """
    try:
        return yaml.load(text, _Loader if with_aliases else _LoaderOfPlain)  # a safe one, made stricter
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"not valid YAML{where}: {' '.join(str(e.problem or e.context).split())}.") from e
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as e:  # of a tag, or of an escape
        raise ConfigError(f"not valid YAML: {' '.join(str(e).split())}.") from e


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses what would be taken for something else, or for ever."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[Any, int] = {}  # values in each node that is complete, with aliases written out

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        if self._depth >= _MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested deeper than {_MAX_DEPTH}; no setting is", self._mark()
            )
        self._depth += 1
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and node not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias of what it stands in", node.start_mark)
        _refuse_twice(node)
        self._sizes[node] = size = 1 + sum(self._sizes[part] for part in _parts_of(node))
        if size > _MAX_VALUES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {_MAX_VALUES:,} values with aliases written out", node.start_mark
            )
        return node

    def _mark(self) -> Any:
        return self.peek_event().start_mark  # type: ignore[no-untyped-call]


class _LoaderOfPlain(_Loader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            said = "aliases (*name) are not taken here; write it out"
            raise yaml.composer.ComposerError(None, None, said, self._mark())
        return super().compose_node(parent, index)


def _refuse_twice(node: yaml.Node) -> None:
    """Refuse a key that stands in a mapping twice: the later one would count, without a word."""
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"key {key.value!r} is given twice; leave one out", key.start_mark
                )
            seen.add((key.tag, key.value))


def _parts_of(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


_Loader.yaml_implicit_resolvers = _LoaderOfPlain.yaml_implicit_resolvers = {
    first: [row for row in rows if row[0] != _TIMESTAMP] for first, rows in _Loader.yaml_implicit_resolvers.items()
}
