"""Directories that are this user's alone, and locks between processes. Standard library only."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("vllm.morphserve")

_SILENT_S = 2.0  # of waiting: ranks that start together wait for each other all the time
_BETWEEN_TRIES_S = 0.05


def private_directory(path: Path) -> None:
    """Create a directory, and what is missing of its parents, for this user alone: a model's weights will lie there.

    One that is there keeps its mode: who shares a cache opens it himself.

    Raises:
        OSError: it cannot be created, or is something else.
    """
    for missing in reversed([directory for directory in path.parents if not directory.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


def only_ours(path: Path) -> bool:
    """Return whether nobody but this user and root can have put there what is there, or can change it."""
    found = path.lstat()
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; a wait for another one is told. It ends with its process.

    Raises:
        OSError: the file cannot be opened, is a link (which may point at anybody's file), or cannot be locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        if not _taken(descriptor):
            logger.info("morphserve: waiting for another process that works in %s (fuser %s)", path.parent, path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    """Return whether the lock could be had before a wait is worth a line."""
    end_s = time.monotonic() + _SILENT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end_s:
                return False
            time.sleep(_BETWEEN_TRIES_S)
        else:
            return True
