"""Files that are there whole or not at all, and those that nobody else may read. Standard library only."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from morphserve.errors import ConfigError

_LEAST_TOKEN, _LONGEST_TOKEN = 16, 512  # characters
_TOKEN = re.compile(f"[!-~]{{{_LEAST_TOKEN},{_LONGEST_TOKEN}}}")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a path beside `file` to write to; what was written takes its place when the block ends well."""
    partial = file.with_name(file.name + ".partial")
    try:
        yield partial
        os.replace(partial, file)
    except BaseException:  # only then: after the move that name may be another process's
        partial.unlink(missing_ok=True)
        raise


def write_whole(file: Path, text: str) -> None:
    """Write so that whoever reads `file`, or kills us, sees the old text or the new one and nothing in between."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def read_token(file: Path) -> str:
    """Return the token that a file holds: a line of its own, which only the file's owner can read.

    As PostgreSQL takes private keys: the file is ours and 0600 or less, or root's and 0640 or less.

    Raises:
        ConfigError: the file cannot be read, others can read it, or what it holds is no token.
    """
    file = file.expanduser()
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
