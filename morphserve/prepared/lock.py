"""Who prepares: one process a model, and beside servers one a host. Either lock is gone with its process."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from morphserve.errors import MorphServeError

TAKEN = 75  # exit status of who found it taken; EX_TEMPFAIL of sysexits.h
_HOST = "\0morphserve-prepares-beside-a-server"  # no file: known in a network namespace, to all users


class TakenError(MorphServeError):
    """Another process prepares."""


def take_model(directory: Path) -> IO[str]:
    """Take the lock on a model's entries; it is held until the file is closed.

    Raises:
        TakenError: another process has it.
        OSError: no file can be made there, or it is a link, which may point at anybody's file.
    """
    file = os.fdopen(os.open(directory / "lock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.close()
        raise TakenError(
            f"another process prepares this model ({directory}). Wait for it, or end it: what it has finished is kept."
        ) from e
    except OSError:
        pass  # a file system without locks
    return file


def take_host() -> socket.socket:
    """Take the lock that one process of a host has which prepares beside a server, until the socket is closed.

    Raises:
        TakenError: another one has it.
    """
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(_HOST)
    except OSError as e:
        lock.close()
        raise TakenError("another server of this host has a model prepared. This one's turn comes later.") from e
    return lock
